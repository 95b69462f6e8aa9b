"""``python -m flash_attn2``: what was built, and the table of kernels."""

from tabulate import tabulate

from . import __version__, introspection, ops

COLUMNS = (
    "name",
    "direction",
    "dtype",
    "head_dim",
    "head_dim_v",
    "tile_m",
    "tile_n",
    "threads",
    "smem_bytes",
    "registers",
    "spill_bytes",
)


def main() -> None:
    if ops.EXTENSION is None:
        print(f"flash_attn2 {__version__}\n{ops.NO_EXTENSION}")
        return
    info = introspection.build_info()
    print(tabulate([(key, _text(value)) for key, value in info.items()], tablefmt="plain"))
    kernels = introspection.list_kernels()
    print()
    print(tabulate([[row[c] for c in COLUMNS] for row in kernels], headers=COLUMNS))


def _text(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    main()
