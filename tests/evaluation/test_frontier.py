import csv
import json
from dataclasses import asdict, replace

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.frontier import equal_kl, frontier
from dpo_lightning.evaluation.plot import COLOURS, colours, draw
from dpo_lightning.evaluation.points import Point, read_points, write_points
from dpo_lightning.tools import run_tool

DPO = [Point(method="DPO", label="beta 0.1", step=step, kl=step / 10, reward=reward, reward_se=0.05, kl_se=0.1)
       for step, reward in [(0, 0.0), (10, 1.0), (20, 1.5)]]  # fmt: skip
OTHER = [
    Point(method="Preferred-FT", step=10, kl=2.0, reward=0.5),
    Point(method="Preferred-FT", step=0, kl=0, reward=0),
]
BEST = [
    Point(method="Best of N", label=f"N = {n}", kl=kl, reward=kl, kl_is_bound=True) for n, kl in [(1, 0.0), (4, 0.6)]
]


def test_equal_kl_by_hand():
    assert equal_kl([*OTHER, *BEST, *DPO])[0][-7:] == [
        "KL 0.5",
        "KL 1",
        "KL 2",
        "DPO over it",
        "least",
        "most",
        "for KL",
    ]
    rows = {row[0]: row for row in equal_kl([*OTHER, *BEST, *DPO])[1:]}
    assert next(iter(rows)) == "DPO"
    assert rows["DPO"][-6:] == ["1.000 ± 0.050", "1.500 ± 0.050", "-", "-", "-", "-"]
    # gaps at KL 0, 1, 2: 0, 0.75, 1; areas 0.375 and 0.875
    assert rows["Preferred-FT"][-6:] == ["0.250", "0.500", "+0.625", "+0.000", "+1.000", "0 to 2"]
    # both rise by 1 a nat up to where best of n ends
    assert rows["Best of N"][-7:] == ["0.500", "-", "-", "+0.000", "+0.000", "+0.000", "0 to 0.6"]


def test_a_method_without_a_point_at_the_reference_begins_at_that_of_another():
    rows = {row[0]: row for row in equal_kl([DPO[1], *BEST])[1:]}
    # halfway between KL 1 and the reference, whose error is not known
    assert rows["DPO"][-6:-4] == ["0.500", "1.000 ± 0.050"]
    assert rows["Best of N"][-1] == "0 to 0.6"
    nearly = Point(method="SFT", kl=-3e-7, reward=0.0, reward_se=0.01)
    assert equal_kl([DPO[1], nearly])[1][-6:-4] == ["0.500 ± 0.030", "1.000 ± 0.050"]
    few, many = (
        Point(method="SFT", kl=0, reward=reward, reward_se=0.01, samples=n) for reward, n in [(0.8, 2), (0.2, 50)]
    )
    assert equal_kl([DPO[1], many, few])[1][-6] == "0.600 ± 0.030"


def test_a_lead_has_an_error_where_both_methods_have():
    best = [replace(point, reward_se=0.1) for point in BEST]
    (_, dpo, row) = equal_kl([*best, *DPO])
    # DPO's error is 0.05 everywhere, the other's 0.1
    assert (dpo[-4], row[-4:]) == ("-", ["+0.000 ± 0.150", "+0.000", "+0.000", "0 to 0.6"])


def test_equal_kl_without_the_baseline_has_rewards_all_the_same():
    (_, row) = equal_kl(OTHER)
    assert row[-5:] == ["0.500", "-", "-", "-", "-"]


def test_files_and_folders_are_read_each_point_once(tmp_path):
    (tmp_path / "a/deep").mkdir(parents=True)
    write_points(tmp_path / "a/deep/dpo.json", DPO, {})
    (tmp_path / "a/logs").mkdir()
    (tmp_path / "a/logs/frontier.jsonl").write_text("".join(json.dumps(asdict(point)) + "\n" for point in OTHER))
    (tmp_path / "a/config.json").write_text('{"points": 3}')
    (tmp_path / "a/broken.json").write_text("{")
    assert read_points([str(tmp_path / "a")]) == [*DPO, *OTHER]
    assert read_points([str(tmp_path / "a"), str(tmp_path / "a/deep/dpo.json")]) == [*DPO, *OTHER]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "is no file of `dpo-lightning evaluate reward_kl`"),
        ("a.json", "{", "cannot be read as JSON"),
        (
            "a.jsonl",
            '{"method": "DPO", "reward": 1}',
            "point 1: no point of reward and KL, 'kl' is missing",
        ),
        ("a.jsonl", '{"kl": 1, "reward": 1}', "'method' is missing or no text"),
        ("a.jsonl", "", "holds no points"),
        ("other.json", None, "There is no file or folder"),
    ],
)
def test_files_that_hold_no_points_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_points([str(tmp_path / name)])


def test_picture_and_tables_from_the_command_line(tmp_path, capsys):
    write_points(tmp_path / "dpo.json", DPO, {})
    write_points(tmp_path / "rest.json", [*OTHER, *BEST], {})
    run_tool(
        "frontier", [f"{tmp_path}/dpo.json", f"{tmp_path}/rest.json", f"{tmp_path}/out/all.png", "--scale", "sqrt"]
    )
    assert (tmp_path / "out/all.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "out/all.csv").open()))
    assert len(rows) == 7
    assert (rows[0]["method"], rows[1]["label"], rows[1]["step"], rows[1]["kl"], rows[1]["kl_se"]) == (
        "DPO", "beta 0.1", "10", "1.0", "0.1"
    )  # fmt: skip
    assert next(csv.reader((tmp_path / "out/all.equal_kl.csv").open()))[0] == "method"
    printed = capsys.readouterr().out
    assert "+0.625" in printed
    assert f"Written: {tmp_path}/out/all.png" in printed


def test_a_method_has_a_colour_and_a_bound_is_dashed_and_called_one():
    axes = draw([*DPO, *OTHER, *BEST]).axes[0]
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    assert list(lines) == ["Best of N (KL: upper bound)", "DPO beta 0.1", "Preferred-FT"]
    assert [line.get_color() for line in lines.values()] == ["#000000", *COLOURS[:2]]
    assert [line.get_linestyle() for line in lines.values()] == ["--", "-", "-"]
    assert list(lines["Preferred-FT"].get_xdata()) == [0, 2.0]  # by step
    assert colours(DPO) == {"DPO": COLOURS[0]}


def test_no_two_methods_look_alike_however_many_there_are():
    trained = [Point(method=f"loss {number}", kl=1, reward=number / 15) for number in range(15)]
    bounds = [
        replace(point, method=f"Best of N by {name}", reward=point.reward * share)
        for name, share in [("A one", 1), ("A two", 0.8), ("B", 0.6)]
        for point in BEST
    ]
    axes = draw([*trained, *bounds]).axes[0]
    lines = [container.lines[0] for container in axes.containers]
    found = [line.get_color() for line in lines]
    assert len(set(found)) == 18
    assert (found[0], found[3:9]) == ("#000000", list(COLOURS))
    assert len({line.get_marker() for line in lines[:3]}) == len({line.get_linestyle() for line in lines[:3]}) == 3
    assert "-" not in {line.get_linestyle() for line in lines[:3]}
    assert [list(line.get_xdata()) for line in lines[:3]] == [[0, 0.6]] * 3
    beside = {(text.get_text(), text.get_color()) for text in axes.texts}
    assert {("N = 4", colour) for colour in found[:3]} <= beside


def test_long_names_leave_the_picture_room():
    name = "Best of N by RewardModel " + "runs/somewhere/" * 8
    (text,) = draw([replace(BEST[0], method=name)]).axes[0].get_legend().get_texts()
    assert max(map(len, text.get_text().splitlines())) <= 44


def test_bounds_have_their_names_beside_them_where_there_is_room():
    places = [(1, 0.0, 0.0), (4, 0.6, 0.8), (32, 2.48, 0.999), (64, 2.5, 1.0)]
    bounds = [
        Point(method="Best of N", label=f"N = {n}", kl=kl, reward=reward, kl_is_bound=True) for n, kl, reward in places
    ]
    (axes,) = draw(bounds).axes
    assert [text.get_text() for text in axes.texts] == ["N = 64", "N = 4", "N = 1"]


def test_the_picture_is_a_png(tmp_path):
    with pytest.raises(UsageError, match=r"as in out\.png"):
        frontier([], "out.pdf")


def test_runs_stand_beside_a_file_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, points in (("a", DPO), ("b", OTHER)):
        write_points(tmp_path / f"{name}.json", points, {})
    run_tool("frontier", ["a.json", "b.json", "--out", "named.png"])
    run_tool("frontier", ["--out=turned.png", "--runs", "a.json", "b.json"])
    named, turned = ((tmp_path / f"{name}.csv").read_text() for name in ("named", "turned"))
    assert named == turned
    assert "DPO" in named
    assert "Preferred-FT" in named
