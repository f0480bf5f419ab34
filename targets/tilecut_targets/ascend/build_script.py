"""`build_on_cann.sh`: what builds an artifact on a machine with CANN, and runs it there against `ref/`."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tilecut_targets.ascend.chips import Chip
from tilecut_targets.ascend.legality import family_row

SCRIPT, TEMPLATE = "build_on_cann.sh", "build_on_cann.sh.j2"
# How far a device may be from the reference outputs: products in fp16.
DEVICE_LIMIT = 1e-2


def write_build_script(folder: Path, chip: Chip) -> None:
    """Write the script for a chip."""
    environment = Environment(
        loader=PackageLoader("tilecut_targets.ascend", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        # Bash has braces of its own.
        variable_start_string="@{",
        variable_end_string="}@",
        block_start_string="@%",
        block_end_string="%@",
        comment_start_string="@#",
        comment_end_string="#@",
    )
    held = family_row(chip.family)
    text = environment.get_template(TEMPLATE).render(
        soc=chip.soc,
        precision=held["precision"],
        profiles=held["profiles"],
        limit=DEVICE_LIMIT,
    )
    path = folder / SCRIPT
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
