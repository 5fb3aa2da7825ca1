"""What is typed, what a terminal shows, and how a command is stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.runs import hear_interrupts

from hedgerow.errors import UserError
from hedgerow.files import check_name, passing_folder, replacing

LONG = "n" * 300


def process(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "hedgerow", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | environment,
        preexec_fn=hear_interrupts,
    )


@pytest.mark.parametrize("name", ["n" * 247, "n" * 248, "n" * 255, "n" + "ü" * 127, "\udcff" * 250])
def test_a_file_is_written_under_any_name_that_it_may_have(tmp_path, name):
    check_name(tmp_path / name, "--out")
    for content in (b"first", b"second"):
        with replacing(tmp_path / name) as file:
            file.write(content)
            assert len(list(tmp_path.glob("*.partial"))) == 1
        assert [each.name for each in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(UserError, match=r"--out: .* is too long"):
        check_name(tmp_path / ("n" * 256), "--out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{file}", "--out", LONG], "--out: nnnn"),
        (["run", "{file}", "--out", "{folder}/" + "long/" * 1000], "too long for the name"),
        (["run", "{file}", "--out", "r", f"data.test={LONG}"], "data.test: nnnn"),
        (["run", "{file}", "--out", "r", f"model.path={LONG}"], "model.path: nnnn"),
        (["run", "{file}", "--out", "r", f"data.prompt=Say {LONG}"], "data.prompt: Say nnnn"),
        (["run", "{file}", "--out", "r", f"data.clients={{a: {LONG}}}"], "data.clients: nnnn"),
        (["compare", "{file}", "--methods", "flora", "--out", LONG], "too long"),
        (["run", LONG, "--out", "r"], "File name too long"),
        (["evaluate", LONG], "File name too long"),
        (["run", "{file}", "--out", ""], "is empty"),
        (["run", "{file}", "--out="], "--out is empty"),
        (["evaluate", ""], "is empty"),
        (["run", "{file}", "--out", "r", "data.test=''"], "`data.test` is empty"),
        (["run", "{file}", "--out", "r", "model.path=' '"], "`model.path` is empty"),
        (["run", "{file}", "--out", "r", 'data.test="a\\0b"'], "NUL"),
        (["run", "{file}", "--out", "/dev/null"], "/dev/null is a file"),
        (["run", "{file}", "--out", "/dev/null/r"], "/dev/null is a file, which can hold"),
        (["run", "{file}", "--out", "{file}/r", "--resume"], "is a file, which can hold"),
        (["run", "{file}", "--out", "/proc/r"], "No such file or directory; name another"),
    ],
)
def test_a_name_that_cannot_be_one_is_a_sentence(
    hedgerow, experiment, tmp_path, monkeypatch, arguments, words
):
    file = experiment()
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    result = hedgerow(
        *(a.format(file=file, folder=tmp_path) if "{f" in a else a for a in arguments)
    )
    assert result.code == 2, result.out
    assert words in result.err
    assert result.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_place_that_may_not_be_written_to_is_said_at_once(
    hedgerow, experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    result = hedgerow("run", experiment(), "--out", tmp_path / "r")
    assert result.code == 2
    assert f"{tmp_path} may not be written to" in result.err
    assert not result.out


def test_the_home_folder_is_found_also_where_the_shell_leaves_it(
    hedgerow, experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = experiment(federation={"rounds": 1})
    (tmp_path / "home").mkdir()
    (tmp_path / "test.json").rename(tmp_path / "home" / "rows.json")
    result = hedgerow("run", path, "data.test=~/rows.json", "--out=~/first")
    assert result.code == 0, result.err
    assert hedgerow("evaluate", "~/first", "--data=~/rows.json").code == 0
    assert (tmp_path / "home" / "first" / "ledger").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.slow) for e in ("latin-1", "utf-8"))]
)
def test_any_encoding_shows_what_it_can(experiment, tmp_path, encoding):
    file, out = experiment(federation={"rounds": 1}), tmp_path / "r"
    for arguments in (["run", file, "--out", out], ["methods", "flora"]):
        running = process(*arguments, PYTHONIOENCODING=encoding)
        shown, _ = running.communicate()
        assert running.returncode == 0, shown
        assert "Traceback" not in shown


def test_a_reader_that_ends_early_gets_no_traceback():
    running = process("explain")
    running.stdout.close()
    assert running.wait() == 1
    running = subprocess.run(
        f"{sys.executable} -m hedgerow explain 2>&1 >/dev/full | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in running.stdout


@pytest.fixture
def endless(experiment):
    return experiment(training={"steps": 100_000})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_a_run_is_told_how_it_goes_on(endless, tmp_path, number):
    running = process("run", endless, "--out", tmp_path / "run")
    while "round 0" not in running.stdout.readline():
        pass
    running.send_signal(number)
    shown, _ = running.communicate()
    assert running.returncode == 128 + number
    assert shown.splitlines() == [
        f"hedgerow: interrupted: what is written in {tmp_path / 'run'} is valid; the same command "
        "goes on from there with --resume"
    ]


SLOWLY = [pytest.param(each, marks=pytest.mark.slow) for each in (0.02, 0.2)]


@pytest.mark.parametrize("seconds", [0, *SLOWLY, 0.6])
def test_who_stops_a_run_twice_is_told_the_same(endless, tmp_path, seconds):
    """Wherever the second one comes: while what is open is closed, or while the process ends."""
    running = process("run", endless, "--out", tmp_path / "run")
    while "round 0" not in running.stdout.readline():
        pass
    for _ in range(3):
        running.send_signal(signal.SIGINT)
        time.sleep(seconds)
    shown, _ = running.communicate()
    assert running.returncode in (130, -signal.SIGINT), shown
    assert "Traceback" not in shown
    assert shown.splitlines() == [
        f"hedgerow: interrupted: what is written in {tmp_path / 'run'} is valid; the same command "
        "goes on from there with --resume"
    ]


def test_who_stops_what_does_not_stop_ends_it_by_a_second(tmp_path):
    """As a library that catches whatever is raised in it."""
    code = """
import sys, time
from hedgerow import cli
from hedgerow.cli import entry
def stubborn(arguments):
    try:
        print("here", flush=True)
        time.sleep(60)
    except BaseException:
        print("caught", flush=True)
    time.sleep(60)
entry._run = stubborn
cli.main()
"""
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_interrupts,
    )
    said = []
    for number in (signal.SIGINT, signal.SIGTERM):
        said.append(running.stdout.readline())
        running.send_signal(number)
    said += running.communicate()[0].splitlines()
    assert said == ["here\n", "caught\n", "hedgerow: interrupted"]
    assert running.returncode == 128 + signal.SIGTERM


def test_a_third_interrupt_does_not_repeat_what_a_second_says():
    code = """
import os, signal
from hedgerow import cli
from hedgerow.cli import entry
from hedgerow.cli.frame import advisers
def advice():
    os.kill(os.getpid(), signal.SIGINT)
    return "there is more to do"
def stubborn(arguments):
    advisers.append(advice)
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pass
entry._run = stubborn
cli.main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=hear_interrupts
    )
    assert ended.stderr == "hedgerow: interrupted: there is more to do\n"
    assert ended.returncode == 128 + signal.SIGINT


def test_who_stops_a_comparison_is_told_how_it_goes_on(endless, tmp_path):
    running = process("compare", endless, "--methods", "flora", "--out", tmp_path / "all")
    while "flora" not in running.stdout.readline():
        pass
    running.send_signal(signal.SIGINT)
    shown, _ = running.communicate()
    assert running.returncode == 130
    assert "given again, the same command does what is missing" in shown
    assert "--resume" not in shown


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_who_stops_it_while_it_starts_is_promised_nothing(endless, tmp_path, seconds):
    running = process("run", endless, "--out", tmp_path / "run")
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    try:
        shown, _ = running.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # Python drops what is raised in a finalizer or a weakref's callback, an interrupt, too.
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=120)
        pytest.skip("the interrupt came while Python could not raise it")
    if "init_import_site" in shown:
        pytest.skip("the interrupt came before Python had begun, which ends with 1 then")
    assert running.returncode in (130, -signal.SIGINT), shown
    assert "--resume" not in shown
    if running.returncode == 130:
        assert shown == "hedgerow: interrupted\n"


@pytest.mark.parametrize("library", ["typer", "yaml"])
def test_an_interrupt_of_which_a_library_makes_another_error_is_one(tmp_path, library):
    """As yaml's C code does, and Python 3.11 where it interrupts the making of a class.

    typer is imported before the command line is read, yaml after it.
    """
    (tmp_path / f"{library}.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt as stop:\n"
        "    raise AttributeError('partially initialized') from stop\n"
    )
    code = "from hedgerow import cli; cli.main()"
    command = [sys.executable, "-c", code, "run", "experiment.yaml", "--out", "run"]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    beside = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, env=beside, preexec_fn=hear_interrupts
    )
    assert (done.returncode, done.stderr) == (130, "hedgerow: interrupted\n")


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path):
    """And nothing that is in use, or that is somebody's own."""
    code = f"""
import os, signal, sys
from pathlib import Path
from hedgerow.files import passing_folder
with passing_folder(Path({str(tmp_path)!r}), ".hedgerow-") as folder:
    (folder / "half").write_text("x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, living = (subprocess.Popen(command, **pipes) for _ in range(2))
    names = [each.stdout.readline().strip() for each in (killed, living)]
    killed.kill()
    killed.wait()
    for own in (".hedgerow-notes", ".hedgerow-012345678"):
        (tmp_path / own).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".hedgerow-00000000").symlink_to("elsewhere")
    (tmp_path / ".hedgerow-11111111").write_text("a file")
    with passing_folder(tmp_path, ".hedgerow-") as folder:
        assert folder.is_dir()
    left = {path.name for path in tmp_path.iterdir()}
    assert names[0] not in left
    assert left == {
        *(names[1], "elsewhere", ".hedgerow-notes", ".hedgerow-012345678"),
        *(".hedgerow-00000000", ".hedgerow-11111111"),
    }
    living.communicate("")
    assert names[1] not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_what_another_user_has_left_stays(tmp_path):
    """Root may remove what lies in the temporary folder of all, but it is nothing of root's."""
    mine, another = tmp_path / ".hedgerow-00000000", tmp_path / ".hedgerow-11111111"
    for folder in (mine, another):
        folder.mkdir()
    os.chown(another, 12345, -1)
    with passing_folder(tmp_path, ".hedgerow-"):
        assert (mine.exists(), another.exists()) == (False, True)


def test_a_model_on_a_hub_that_cannot_be_reached_is_told_soon(experiment, tmp_path):
    began = time.monotonic()
    arguments = ["run", experiment(), "model.path=acme/tiny", "--out", tmp_path / "run"]
    running = process(*arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    shown, _ = running.communicate()
    assert running.returncode == 2
    assert shown.startswith(
        "hedgerow: model.path: acme/tiny is no folder, and the Hugging Face Hub"
    )
    assert shown.count("\n") == 1
    assert time.monotonic() - began < 20  # where it would be tried for 50 seconds
