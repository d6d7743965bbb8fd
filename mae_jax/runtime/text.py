"""Numbers formatted for people."""


def si(value: float) -> str:
    """A number with three digits and an SI prefix: 5.68e7 -> "56.8 M"."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


def size_text(size: tuple[int, int]) -> str:
    """The size of an image as text: (224, 160) -> "224 x 160 pixels"."""
    return f"{size[0]} x {size[1]} pixels"
