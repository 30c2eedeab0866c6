"""The figure that every picture is drawn on. This file alone imports matplotlib when it is loaded."""

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure of matplotlib, without pyplot, that a notebook shows."""

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
