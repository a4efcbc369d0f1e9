"""Finished runs side by side, from their directories: one table and one page."""

import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_OK
from plates.tool_config import CompareConfig


def compare(config: CompareConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates import rundir
    from plates.report import align_columns, comparison, write_page

    runs = comparison.find_runs(config.runs)
    run = rundir.find_run(config.out, "compare", config)
    rundir.claim_run(run, "compare", config, {"versions": rundir.versions()})
    apart = comparison.why_apart(runs)
    images = {} if apart else comparison.compare_predictions(runs)
    rundir.write_csv(run / "compare.csv", comparison.tabulate_runs(runs))
    settings, num_alike, num_partial = comparison.list_settings(runs)
    figures, header = comparison.list_figures(runs), ["", *(one.title for one in runs)]
    page = write_page(
        run / "compare.html",
        run=run.name,
        header=header,
        directories=[[one.title, one.config["job"], str(one.place)] for one in runs],
        figures=[[cell.replace(" (", "\n(") for cell in row] for row in figures],  # narrower
        settings=settings,
        num_alike=num_alike,
        num_partial=num_partial,
        plots=comparison.draw_curves(runs),
        apart=apart,
        images=images,
        has_several_data=len({one.config["data"] for one in runs}) > 1,
        tested=comparison.MCNEMAR,
        held_out=comparison.HELD_OUT,
    )
    rundir.finish_run(run)
    print(align_columns([header, *settings], text_columns=len(header), width=120), end="\n\n")
    print(align_columns([header, *figures], text_columns=1, width=240))
    print(f"{num_alike} other settings are alike, {num_partial} are of some runs alone. {apart}")
    for title, section in images.items():
        print(f"\n{title}: {section['num_shared']} shared, runs disagree on {section['num_disagreed']}")
        if section["pairs"]:
            print(align_columns([comparison.MCNEMAR, *section["pairs"]], text_columns=1))
        else:
            print("none of them has a known label: which run is right more often cannot be tested")
    print(f"report: {page}")
    return EXIT_OK


main = partial(run_job, compare, CompareConfig, "plates compare")

if __name__ == "__main__":
    sys.exit(main())
