"""Curves of runs: as many lines as there are runs, with their numbers; pictures whole or not at all."""

from types import SimpleNamespace

import pytest

from moemla.errors import DataError, MoemlaError
from moemla.plots import COLOURS, CURVES, curves, save
from moemla.runs import Progress

STEPS = (10, 20, 30)


def rows(loss: float = 2.0, experts: bool = True, **more) -> list[Progress]:
    load = dict(load_cv=0.5, load_cv_floor=0.1, load_window=4) if experts else {}
    times = dict(seconds=1.0, seconds_left=1.0, utilisation=0.5, grad_norm=1.0, tokens=64)
    return [Progress(step=s, loss=loss + s, lr=1e-3, tokens_per_second=100.0, **times, **load, **more) for s in STEPS]


def drawn(figure) -> list[list]:
    return [[(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axis.lines] for axis in figure.axes]


def test_a_line_for_each_run_with_its_numbers():
    figure = curves({"a": rows(2.0), "b": rows(3.0), "c": rows(4.0)})
    (axis,) = figure.axes
    assert drawn(figure) == [[(STEPS, tuple(loss + s for s in STEPS)) for loss in (2.0, 3.0, 4.0)]]
    assert axis.get_xlabel() == "step" and axis.get_ylabel() == "loss, nats per token"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b", "c"]
    assert len({line.get_color() for line in axis.lines}) == 3


def test_an_axis_for_each_kind_with_its_unit():
    figure = curves({"a": rows(), "b": rows()}, tuple(CURVES))
    assert [axis.get_ylabel() for axis in figure.axes] == [label for _, label in CURVES.values()]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "step"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 4, 2]  # load has floors
    assert drawn(figure)[3][0] == (STEPS, (100.0,) * 3) and drawn(figure)[1][0] == (STEPS, (1e-3,) * 3)


def test_load_stands_beside_its_floor_and_layers_where_they_are_known():
    (axis,) = curves({"a": rows()}, ("load",)).axes
    load, floor = axis.lines
    assert set(load.get_ydata()) == {0.5} and set(floor.get_ydata()) == {0.1}
    assert floor.get_linestyle() == ":" and load.get_color() == floor.get_color()
    layered = [SimpleNamespace(**vars(row) | dict(load_cv_by_layer=[0.4, 0.6])) for row in rows()]
    (axis,) = curves({"a": layered}, ("load",)).axes
    assert [set(line.get_ydata()) for line in axis.lines] == [{0.5}, {0.1}, {0.4}, {0.6}]
    assert len(axis.get_legend().get_texts()) == 1


def test_validation_is_points_on_the_loss():
    run = rows()
    run[1].valid_loss = 1.5
    (axis,) = curves({"a": run}).axes
    assert [tuple(line.get_xdata()) for line in axis.lines] == [STEPS, (20,)]
    assert axis.lines[1].get_linestyle() == "None" and axis.lines[1].get_color() == axis.lines[0].get_color()


def test_a_run_without_experts_has_no_load():
    figure = curves({"dense": rows(experts=False), "moe": rows()}, ("load", "loss"))
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]
    assert figure.axes[0].lines[0].get_color() == figure.axes[1].lines[1].get_color()  # the same run, the same colour
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["dense", "moe"]
    with pytest.raises(MoemlaError, match="load: nothing of it is in the log of dense"):
        curves({"dense": rows(experts=False)}, ("loss", "load"))


def test_more_runs_than_colours_can_be_told_apart():
    (axis,) = curves({str(n): rows() for n in range(2 * len(COLOURS))}).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 2 * len(COLOURS)


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="what='speed': choose one of loss, lr, load, tokens-per-second"):
        curves({"a": rows()}, ("speed",))


def test_pictures_are_written_and_replaced(tmp_path):
    for name in ("x.svg", "x.png"):
        save(curves({"a": rows(), "b": rows()}), tmp_path / name)
        first = (tmp_path / name).read_bytes()
        save(curves({"a": rows(), "b": rows()}), tmp_path / name)
        assert (tmp_path / name).read_bytes() == first  # no dates, no random names
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert 'id="loss a"' in text and 'id="loss b"' in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_picture_stays(tmp_path):
    figure = curves({"a": rows()})
    notes = tmp_path / "notes.svg"
    notes.write_text("buy milk")
    with pytest.raises(MoemlaError, match=r"notes.svg is there and no .svg picture: name another file"):
        save(figure, notes)
    assert notes.read_text() == "buy milk"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MoemlaError, match=r"no .png picture"):
        save(figure, tmp_path / "folder.png")
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        save(figure, tmp_path / "x.jpg")
    with pytest.raises(DataError, match="cannot write"):
        save(figure, tmp_path / "nowhere" / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "notes.svg"]
