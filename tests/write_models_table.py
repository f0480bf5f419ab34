"""Write README's table of models: `python tests/write_models_table.py`."""

from checks import randomise
from support import support_of, write_readme
from tilecut_passes.capture import capture
from zoo import ZOO


def main() -> None:
    """Capture every model of the zoo and look what can be cut."""
    rows = {}
    for name, entry in ZOO.items():
        built = entry.build()
        model, example = built if isinstance(built, tuple) else (built, None)
        rows[name] = support_of(capture(randomise(model), example), entry.frozen)
        print(entry.title, *rows[name].cells, f"{rows[name].frozen:.1%}", sep=" | ")
    write_readme(rows)


if __name__ == "__main__":
    main()
