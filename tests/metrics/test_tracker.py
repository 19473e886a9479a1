import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.machinery import PathFinder
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from config import InputError, Run
from tests.helpers.small_runs import FOUR_PHASES, small_run
from train import main
from utils.metrics import tracker
from utils.metrics.history import (
    HISTORY_FILE,
    PLOT_FILE,
    History,
    read_history,
    run_record,
    select_events,
)
from utils.metrics.tracker import (
    GROWTH_FIELDS,
    PICTURE_GROWTH,
    RunTracker,
    Tracker,
    check_tracker,
    tracked_values,
)
from utils.runtime.signals import Stopped

CONFIG = {"seed": 3, "training": {"lr_phase1": 0.1}}
LOSSES = [{"tokens": 100 * step, "loss": 1 / step} for step in range(1, 5)]


class FakeWriter:
    """Stands in for tensorboard's writer, which is not there on every machine."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.written, self.num_flushed = folder, purge_step, [], 0

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))

    def add_text(self, name, text):
        self.config = json.loads(text.strip("`\n"))

    def flush(self):
        self.num_flushed = len(self.written)


@pytest.fixture
def writers(monkeypatch):
    """The writers that are started, in order."""

    def start_writer(*args, **kwargs):
        started.append(FakeWriter(*args, **kwargs))
        return started[-1]

    started = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = start_writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return started


def record(folder, events, name="tensorboard", length=None):
    """Writes steps into a history and a tracker. Returns the history's size in bytes."""
    path = folder / HISTORY_FILE
    tracker = RunTracker(name, folder)
    with tracker, History(path, length=length, also=tracker.send_event) as history:
        if not history.size():
            history("run", config=CONFIG)
        for event in events:
            history("step", phase=1, phase_name="dense", step=3, **event)
        return history.size()


def record_and_resume(folder, name="tensorboard"):
    """Records LOSSES in a run that was stopped after a third step of which nothing is left."""
    size = record(folder, LOSSES[:2], name)
    record(folder, [{"tokens": 300, "loss": 99.0}], name)
    record(folder, LOSSES[2:], name, length=size)


def scalars(events):
    return [("step/loss", event["loss"], event["tokens"]) for event in events]


def test_only_numbers_that_are_measures_are_tracked():
    event = {"event": "grow", "wall_s": 1.0, "phase": 2, "tokens": 5, "growth": "Widen"}
    measures = {"passed": True, "loss_drift": 0.5, "flipped": 3, "kl": None, "load_min": [[1.0]]}
    assert tracked_values(event | measures) == {"grow/loss_drift": 0.5, "grow/flipped": 3}
    assert tracked_values({"event": "run", "seed": 3}) == {}
    assert tracked_values({"event": "change", "tokens": 9, "old": 1, "new": 2}) == {}


def test_tensorboard_gets_each_number_at_its_tokens_at_once(writers, tmp_path):
    run_tracker = RunTracker("tensorboard", tmp_path)
    with History(tmp_path / HISTORY_FILE, also=run_tracker.send_event) as history:
        history("run", config=CONFIG)
        for event in LOSSES:
            history("step", step=1, **event)
            assert writers[0].num_flushed == len(writers[0].written)
    (writer,) = writers
    assert writer.config == CONFIG
    assert writer.folder == str(tmp_path / "tensorboard") and writer.written == scalars(LOSSES)


def test_after_a_resumption_it_shows_what_the_history_holds_and_nothing_twice(writers, tmp_path):
    record_and_resume(tmp_path)
    assert writers[-1].written == scalars(LOSSES)
    assert [writer.purge_step for writer in writers] == [0, 0, 0]


@pytest.mark.parametrize("moment", ["start", "second event"])
def test_a_tracker_that_fails_warns_once_and_the_history_is_whole(
    moment, monkeypatch, tmp_path, capsys
):
    def start_broken(out, record):
        if moment == "start":
            raise ModuleNotFoundError("gone\naway")
        seen = []

        def log(values, tokens, line):
            seen.append(tokens)
            if len(seen) > 1:
                raise ConnectionError("gone\naway")

        return Tracker(log, lambda exit_code: pytest.fail("it has failed before"))

    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", start_broken)
    record(tmp_path, LOSSES)
    assert len(read_history(tmp_path / HISTORY_FILE)) == 1 + len(LOSSES)
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: tracker = tensorboard failed (") and "gone away" in warning


def test_a_tracker_that_there_is_not_is_refused_by_name():
    with pytest.raises(
        InputError, match="tracker = 'wand' must be 'none' or 'tensorboard' or 'wandb'"
    ):
        Run(tracker="wand")


def test_no_tracker_imports_nothing(tmp_path):
    before = set(sys.modules)
    check_tracker("none")
    record(tmp_path, LOSSES, "none")
    added = set(sys.modules) - before
    assert not {name for name in added if "tensorboard" in name or "wandb" in name}


@pytest.mark.parametrize("name", tracker.TRACKERS)
def test_a_missing_library_is_told_with_its_command_before_anything_is_done(
    name, monkeypatch, tmp_path
):
    """A folder of the library's name, such as wandb makes one, is not taken for it."""
    (tmp_path / name).mkdir()
    find_here = partial(PathFinder.find_spec, path=[str(tmp_path)])
    monkeypatch.setattr(tracker, "find_spec", find_here)
    run = Run(tracker=name, out=tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match=f"^tracker = {name} needs a library: pip install {name}$"):
        main(run)
    assert not run.out.exists()


@pytest.fixture
def sent(monkeypatch):
    """A tracker that keeps what it gets: (values, tokens, line), and the exit code."""
    sent = SimpleNamespace(logged=[], exit_codes=[])

    def start(out, record):
        sent.record = record
        return Tracker(lambda *values: sent.logged.append(values), sent.exit_codes.append)

    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", start)
    monkeypatch.setattr(tracker, "find_spec", lambda name: SimpleNamespace(origin="there"))
    return sent


def test_a_tracker_gets_the_settings_every_number_each_growth_and_the_last_picture(sent, tmp_path):
    run = small_run(tmp_path, FOUR_PHASES, tracker="tensorboard")
    main(run)
    events = read_history(run.out / HISTORY_FILE)
    assert sent.record == events[0]
    numbers = [(tracked_values(e), e["tokens"], i) for i, e in enumerate(events) if "tokens" in e]
    names = {name for name, value in sent.logged[-1][0].items() if isinstance(value, Path)}
    assert names == {"training_curves"} and sent.exit_codes == [0]
    *logged, (picture, tokens, line) = sent.logged
    assert picture == {"training_curves": run.out / PLOT_FILE}
    assert (tokens, line) == (events[-1]["tokens"], len(events) - 1)
    without_tables = [
        ({k: v for k, v in values.items() if k != "growths"}, *place) for values, *place in logged
    ]
    assert without_tables == [(values, *place) for values, *place in numbers if values]
    tables = [values["growths"] for values, *_ in logged if "growths" in values]
    rows = [tuple(event[name] for name in GROWTH_FIELDS) for event in select_events(events, "grow")]
    assert tables == [[GROWTH_FIELDS, *rows[:count]] for count in (1, 2, 3)]


def test_pictures_are_sent_ever_more_seldom_and_the_last_one_always(sent, tmp_path):
    picture = tmp_path / PLOT_FILE
    run_tracker = RunTracker("tensorboard", tmp_path)
    run_tracker.send_picture(picture)
    run_tracker.send_event({"event": "run", "wall_s": 0.0, "config": CONFIG})
    run_tracker.send_picture(picture)
    assert sent.logged == []  # no picture has been drawn
    picture.touch()
    tokens = range(100, 100_000, 100)
    for count in tokens:
        run_tracker.send_event({"event": "step", "wall_s": 1.0, "tokens": count})
        run_tracker.send_picture(picture)
    times = [count for _, count, _ in sent.logged]
    assert times[0] == tokens[0] and len(times) < 35
    assert all(b >= PICTURE_GROWTH * a for a, b in pairwise(times))
    run_tracker.send_picture(picture, is_last=True)
    assert [count for _, count, _ in sent.logged] == [*times, tokens[-1]]


def test_a_run_that_is_stopped_is_finished_as_one_that_failed(sent, tmp_path):
    with pytest.raises(Stopped), RunTracker("tensorboard", tmp_path) as run_tracker:
        run_tracker.send_event({"event": "run", "wall_s": 0.0, "config": CONFIG})
        raise Stopped(2)
    assert sent.exit_codes == [1]


def test_weights_and_biases_goes_on_in_the_same_run_with_the_lines_that_it_lacks(
    monkeypatch, tmp_path
):
    def start_run(**options):
        started.append(options)
        return SimpleNamespace(
            step=len(lines),  # what the server has of the run
            define_metric=lambda name, step_metric: None,
            log=lambda values, step: lines.append((step, values)),
            finish=lambda exit_code: None,
        )

    started, lines = [], []
    module = ModuleType("wandb")
    module.init = start_run
    monkeypatch.setitem(sys.modules, "wandb", module)
    lines.append((0, "the run's start"))
    size = record(tmp_path, LOSSES[:2], "wandb")
    record(tmp_path, LOSSES[2:], "wandb", length=size)
    assert lines[1:] == [
        (line, {"step/loss": event["loss"], "tokens": event["tokens"]})
        for line, event in enumerate(LOSSES, 1)
    ]
    first, second = started
    assert first == second and first["config"] == CONFIG and first["resume"] == "allow"
    (tmp_path / HISTORY_FILE).unlink()
    record(tmp_path, LOSSES[:2], "wandb")
    assert started[-1]["id"] != first["id"]


def test_the_real_tensorboard_reads_back_what_was_written_last(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record_and_resume(tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in read.Scalars("step/loss")]
    assert values == [(event["tokens"], pytest.approx(event["loss"])) for event in LOSSES]


def test_the_real_tensorboard_holds_the_growths_and_the_picture(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run(tmp_path, FOUR_PHASES, tracker="tensorboard")
    main(run)
    events = read_history(run.out / HISTORY_FILE)
    read = EventAccumulator(str(run.out / "tensorboard")).Reload()
    image = read.Images("training_curves")[-1]
    assert (
        image.encoded_image_string.startswith(b"\x89PNG") and min(image.width, image.height) > 500
    )
    table = read.Tensors("growths/text_summary")[-1].tensor_proto.string_val[0].decode()
    losses = [str(event["loss_after"]) for event in select_events(events, "grow")]
    assert [line.split(" | ")[3] for line in table.splitlines()[2:]] == losses


def offline_records(folder: Path) -> Iterator:
    """The records of a W&B run that was kept offline: a header of 7 bytes, then a log of parts in
    blocks of 32 KiB, each part with its checksum, length and kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def offline_run(folder: Path) -> tuple[str, dict, list[dict]]:
    """Id, settings and rows of a W&B run that was kept offline."""
    records = list(offline_records(folder))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    rows = [
        {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in row.item}
        for row in (record.history for record in records)
        if row.item
    ]
    return run.run_id, config, rows


@pytest.fixture
def wandb_offline(monkeypatch):
    pytest.importorskip("wandb.sdk")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_the_real_wandb_holds_every_number_the_growths_and_the_picture(wandb_offline, tmp_path):
    run = small_run(tmp_path, FOUR_PHASES, tracker="wandb")
    main(run)
    events = read_history(run.out / HISTORY_FILE)
    (folder,) = (run.out / "wandb").glob("offline-run-*")
    _, config, rows = offline_run(folder)
    assert {name: config[name] for name in asdict(run)} == run_record(events)["config"]
    by_line = {row["_step"]: row for row in rows}
    for line, event in enumerate(events):
        for name, value in tracked_values(event).items():
            assert by_line[line][name] == value and by_line[line]["tokens"] == event["tokens"]
    assert by_line[len(events) - 1]["training_curves._type"] == "image-file"
    (*_, picture) = sorted(folder.glob("files/media/images/*.png"), key=os.path.getmtime)
    assert picture.read_bytes() == (run.out / PLOT_FILE).read_bytes()
    (*_, table) = sorted(folder.glob("files/media/table/*.json"), key=os.path.getmtime)
    content = json.loads(table.read_text())
    assert content["columns"] == list(GROWTH_FIELDS)
    assert content["data"] == [[e[n] for n in GROWTH_FIELDS] for e in select_events(events, "grow")]


def test_the_real_wandb_goes_on_in_the_same_run(wandb_offline, tmp_path):
    record_and_resume(tmp_path, "wandb")
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"), key=os.path.getmtime)
    ids, _, rows = zip(*map(offline_run, folders), strict=True)
    assert len(folders) > 1 and len(set(ids)) == 1
    last = [(row["tokens"], row["step/loss"]) for row in rows[-1]]
    assert last == [(event["tokens"], event["loss"]) for event in LOSSES]
