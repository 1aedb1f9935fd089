"""The picture: written without a display, refused by name without matplotlib."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from epmoe.cli import heatmap


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (30, 32)])
@pytest.mark.parametrize("top", [1.0, 1.4, 9.0])
def test_a_picture_of_every_shape(tmp_path, shape, top):
    pytest.importorskip("matplotlib")
    share = np.ones(shape)
    share[0, 0] = top
    heatmap.write(str(tmp_path / "a.png"), {"before": share, "after": np.ones(shape)})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'epmoe\[bench\]'"):
        heatmap.write(str(tmp_path / "a.png"), {"before": np.ones((1, 2))})
    assert list(tmp_path.iterdir()) == []
