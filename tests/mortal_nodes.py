"""Ray's fake provider of nodes on this machine, which like a cloud's tells when one has ended by itself."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class MortalNodes(FakeMultiNodeProvider):
    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            workers: dict[str, Any] = {name: node["node"] for name, node in self._nodes.items() if "node" in node}
            for name, node in workers.items():
                if node.dead_processes():
                    self.terminate_node(name)
        return super().non_terminated_nodes(tag_filters)
