"""Grids and plots: pixel-exact where that is defined, else that a readable file appears."""

import jax
import numpy as np
import pytest
from PIL import Image

from diffrl.errors import UserError
from diffrl.evaluate import grids, plots


def test_to_uint8_inverts_the_data_pipeline_exactly():
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(grids.to_uint8(levels / np.float32(127.5) - 1), levels)
    assert np.array_equal(grids.to_uint8(np.array([-9.0, 9.0, np.nan, np.inf])), [0, 255, 0, 255])
    assert np.array_equal(grids.to_uint8(levels), levels)


def test_grid_by_hand():
    """Three one-pixel images in two columns: padding of one around each, and a blank last place."""
    images = np.array([0, 100, 200], np.uint8).reshape(3, 1, 1, 1)
    grid = grids.image_grid(images, columns=2, padding=1, scale=1)[..., 0]
    w = 255
    assert grid.tolist() == [[w] * 5, [w, 0, w, 100, w], [w] * 5, [w, 200, w, w, w], [w] * 5]


@pytest.mark.parametrize(("side", "scale"), [(8, 6), (28, 2), (32, 2), (48, 1), (64, 1)])
def test_small_images_are_enlarged(side, scale):
    assert grids.image_grid(np.zeros((1, side, side, 3)), padding=0).shape == (side * scale, side * scale, 3)


def test_enlargement_is_nearest_neighbour():
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), np.uint8)
    grid = grids.image_grid(image, padding=0, scale=3)
    assert np.array_equal(grid[1::3, 1::3], image[0])
    assert np.array_equal(np.unique(grid), np.unique(image))


def test_class_grid_puts_each_class_in_its_row():
    labels = np.array([2, 0, 2, 0, 2, 5])
    images = np.broadcast_to((labels * 40).astype(np.uint8)[:, None, None, None], (6, 4, 4, 1))
    grid = grids.class_grid(images, labels, columns=2, scale=10)
    plain = grids.image_grid(images[[1, 3, 0, 2, 5, 5]], columns=2, scale=10)
    plain[-42:, -42:] = 255  # class 5 has one image: its second place is blank
    margin = grid.shape[1] - plain.shape[1]
    assert np.array_equal(grid[:, margin:], plain)
    for row in range(3):
        assert grid[row * 42 : (row + 1) * 42, :margin].min() < 128, "each row has its name"


def test_png_round_trip(tmp_path):
    for channels in (1, 3, 4):
        picture = np.random.default_rng(1).integers(0, 256, (5, 7, channels), np.uint8)
        grids.save_png(tmp_path / "new" / "p.png", picture)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "p.png")).reshape(picture.shape), picture)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    grids.save_png(tmp_path / "p.png", np.zeros((2, 2, 1), np.uint8))
    plots.curves(tmp_path / "loss.png", {"x": ([0, 1], [1, 2])}, "step", "loss")
    assert not list(tmp_path.iterdir())


def test_plots_write_files_of_their_kind(tmp_path):
    steps = np.arange(1, 100)
    plots.curves(tmp_path / "a" / "loss.png", {"x": (steps, 1 / steps)}, "step", "loss", log_y=True, smooth=10)
    assert Image.open(tmp_path / "a" / "loss.png").size == (960, 600)
    plots.points(tmp_path / "cloud.svg", {"data": np.eye(2), "samples": -np.eye(2)})
    assert "</svg>" in (tmp_path / "cloud.svg").read_text()


def test_ranking_puts_the_largest_on_top(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda path, figure, axes, legend: drawn.append(axes))
    plots.ranking(tmp_path / "x.png", {"low": (1, 0.1), "high": (3, 0.2), "middle": (2, 0.1)}, "loss")
    assert [tick.get_text() for tick in drawn[0].get_yticklabels()] == ["low", "middle", "high"]


def test_smoothing_keeps_points_at_their_place(tmp_path, monkeypatch):
    """A running mean of a straight line, drawn at the window's last step, lags by half a window."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda path, figure, axes, legend: drawn.extend(axes.get_lines()))
    plots.curves(tmp_path / "x.png", {"line": (np.arange(10), np.arange(10.0))}, "x", "y", smooth=3)
    x, y = drawn[-1].get_data()
    assert np.allclose(y, np.asarray(x) - 1)
    assert list(x) == list(range(2, 10))


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    calls = [
        (lambda: grids.image_grid(np.zeros((2, 8, 8))), "shape"),
        (lambda: grids.image_grid(np.zeros((0, 8, 8, 1))), "shape"),
        (lambda: grids.save_png(tmp_path / "file" / "a.png", np.zeros((2, 2, 1))), "cannot be written"),
        (lambda: plots.points(tmp_path / "file" / "a.png", {"a": np.eye(2)}), "cannot be written"),
    ]
    for call, text in calls:
        with pytest.raises(UserError, match=text) as error:
            call()
        assert "\n" not in str(error.value)
