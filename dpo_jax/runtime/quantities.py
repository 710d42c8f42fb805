"""Sizes and times as people read them; files keep plain numbers."""

from __future__ import annotations


def size(count: float) -> str:
    """Returns a number of bytes in the largest unit of which there is at least one.

    >>> size(800), size(1.5e9), size(200e6)
    ('800 bytes', '1.4 GiB', '191 MiB')
    """
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while round(count / 1024**power, 1) >= 1000 and power < len(units) - 1:
        power += 1
    number = count / 1024**power
    return f"{number:.1f} {units[power]}" if power and number < 99.95 else f"{number:,.0f} {units[power]}"


def duration(seconds: float, *, digits: int = 1) -> str:
    """Returns a time in its two largest units; below ten seconds with `digits` after the point.

    >>> duration(3.14), duration(45), duration(400), duration(7500), duration(2 * 86400)
    ('3.1 s', '45 s', '6 min 40 s', '2 h 5 min', '2 d')
    """
    if seconds < 9.95:
        return f"{seconds:.{digits}f} s"
    larger = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for unit, name, smaller, smaller_name in larger:
        whole = round(seconds / smaller) * smaller  # rounded first, so that 59.9 s after 1 min are 2 min
        if whole >= unit:
            many, rest = divmod(whole, unit)
            return f"{many} {name}" + (f" {rest // smaller} {smaller_name}" if rest else "")
    return f"{seconds:.0f} s"
