"""A checkpoint as files that run without this package: ONNX, torch.export, and a folder of timm."""
