"""Byte counts as text."""


def format_bytes(count: int) -> str:
    """Return a number of bytes as text: 20 KiB, 512 MiB, 1.5 GiB."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
