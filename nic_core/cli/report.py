"""``nic report``: the evaluation of a study as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import console, one_line
from nic_core.store import Store, StoreError, atomic_file


def report(
    out: Annotated[Path, typer.Option(help="file to write", dir_okay=False)] = Path("report.html"),
    pdf: Annotated[
        bool, typer.Option("--pdf", help="also write the report as PDF, beside the file")
    ] = False,
    cohort: Annotated[
        Path | None, typer.Option(help="cohort file; default: $NIC_COHORT, or that of the demo")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="store; default: $NIC_STORE")] = None,
) -> None:
    """Write the evaluation of a study as one HTML file that opens without a server.

    It holds the flow of exclusions, splits, encoders, results with intervals and pictures,
    comparisons, failed checks, methods, limits, software and hashes, and no id of a slide or
    patient. The store is not changed.
    """
    if out.suffix == ".pdf":
        raise typer.BadParameter(
            "name the HTML file; --pdf writes a PDF beside it", param_hint="--out"
        )
    from nic_core import steps
    from nic_core.cohort import CohortError, load_cohort
    from nic_core.encoders import EncoderError
    from nic_core.models.files import ModelFileError
    from nic_core.reports.html import PdfError, pdf_of_html, render_html

    with one_line(CohortError, StoreError, EncoderError, ModelFileError, PdfError):
        study = load_cohort(cohort)
        products = Store(store.resolve()) if store else Store.from_environment()
        collected = steps.collect_report(study, products)
        html = render_html(steps.report_document(study, products, collected))
        files = {out: html.encode()}
        if pdf:
            files[out.with_suffix(".pdf")] = pdf_of_html(html)
        for path, content in files.items():
            with atomic_file(path.resolve()) as new:
                new.write_bytes(content)
            console.print(f"{path}  {len(content) / 1e6:.1f} MB", soft_wrap=True, markup=False)
