"""The translate command: text in, text out, and nothing else on standard output."""

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import SOURCES, files_config, save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "translate.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return save_tiny_model(folder / "model", files_config(folder), num_leaked=0)


def run(
    *arguments: str | bytes | Path, stdin: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        input=stdin,
        capture_output=True,
        env=ENVIRONMENT,
        cwd=cwd,
        timeout=120,
    )


def output(result: subprocess.CompletedProcess[bytes]) -> list[str]:
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.endswith(b"\n") or not result.stdout
    return result.stdout.decode().split("\n")[:-1]


ODD_LINES = [
    SOURCES[0].encode(),
    b"",
    b"\xff\xfe not UTF-8 \xc3",
    b"\x00",
    b"control \x1b[0m \x07",
    "one\u2028line\x0b\x0c\x85".encode(),
    "😀👩‍👩‍👧‍👦 ไทย 中文 𐌰𐌱𐌲".encode(),
    b"   ",
    b"carriage\rreturn\r",
    b"word " * 20_000,
    SOURCES[0].encode(),
]


def test_one_line_in_one_line_out(model: Path) -> None:
    found = output(run("-m", model, "-b", "1", stdin=b"\n".join(ODD_LINES) + b"\n"))
    assert len(found) == len(ODD_LINES)
    assert {1, 3, 7} <= {index for index, line in enumerate(found) if not line}
    assert found[0] == found[-1] != ""


def test_arguments_input_and_files_agree(model: Path, tmp_path: Path) -> None:
    texts = SOURCES[:5]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    from_arguments = output(run("--model", model, *texts))
    piped = output(run("-m", model, stdin="\n".join(texts).encode()))  # no newline at the end
    written = tmp_path / "out.txt"
    result = run("-m", model, "-i", tmp_path / "in.txt", "-o", written)
    assert output(result) == []
    assert written.read_text().split("\n")[:-1] == from_arguments == piped
    assert len(piped) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_an_argument_is_a_line(model: Path) -> None:
    found = output(run("-m", model, "the man\nand his dog", os.fsencode("dog \udcff"), ""))
    assert len(found) == 3


def test_n_best_and_scores(model: Path) -> None:
    stdin = "\n".join([SOURCES[0], "", SOURCES[1]]).encode()
    n_best = [
        line.split(" ||| ") for line in output(run("-m", model, "--n-best", "2", stdin=stdin))
    ]
    assert [number for number, _, _ in n_best] == ["0", "0", "1", "2", "2"]
    assert n_best[2][1] == ""
    for first, second in (n_best[:2], n_best[3:]):
        assert 0 >= float(first[2]) >= float(second[2])
    scored = [line.split("\t") for line in output(run("-m", model, "--scores", stdin=stdin))]
    assert [text for _, text in scored] == output(run("-m", model, stdin=stdin))
    assert all(float(score) <= 0 for score, _ in scored)


def test_nothing_in_nothing_out(model: Path) -> None:
    assert output(run("-m", model)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "nowhere"], "nowhere"),
        ([], "runs/last"),
        (["--device", "tpu"], "tpu"),
        (["-b", "0"], "at least 1"),
        (["-i", "in.txt", "text"], "not both"),
    ],
)
def test_errors_are_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, stdin=b"text\n", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == b""
    assert message in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()
    assert len([line for line in result.stderr.decode().splitlines() if "error:" in line]) == 1


@pytest.mark.slow
def test_workers_change_nothing(model: Path, tmp_path: Path) -> None:
    """More chunks than the workers are given at a time, of which the last ends in no newline."""
    text = tmp_path / "in.txt"
    words = ["the", "man", "sees", "a", "red", "house"]
    lines = [f"{' '.join(words[: 1 + n % 6])} {n}" for n in range(9000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    outputs = []
    for workers in ("1", "3"):
        target = tmp_path / workers
        options = ["-i", str(text), "-o", str(target), "-b", "1", "--threads", "1"]
        result = run("-m", str(model), *options, "--workers", workers)
        assert result.returncode == 0, result.stderr
        outputs.append(target.read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"\n") == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, signal.SIGPIPE])
def test_no_worker_outlives_its_parent(model: Path, tmp_path: Path, end: signal.Signals) -> None:
    text = tmp_path / "in.txt"
    text.write_text("the man sees a red house\n" * 20_000)
    program = [sys.executable, SCRIPT, "-m", model, "-b", "1", "--workers", "2", "-i", text]
    with subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        if end is signal.SIGPIPE:
            process.stdout.close()
        else:
            process.send_signal(end)
        # Its end is there when the last process that could write has ended.
        _, errors = process.communicate(timeout=30)
    codes = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL, signal.SIGPIPE: 0}
    assert process.returncode == codes[end]
    if end is not signal.SIGKILL:
        assert errors == b""


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the man\n" * 3)
    result = run("-m", str(tmp_path), "-i", str(tmp_path / "in.txt"), "--workers", "2")
    assert result.returncode == 2
    (line,) = result.stderr.decode().splitlines()
    assert "holds no model" in line


def test_a_missing_input_leaves_the_output_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    result = run("-m", model, "-i", tmp_path / "in.txt", "-o", tmp_path / "out.txt")
    assert result.returncode == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    command = f'yes "the man" | head -c 400000 | "{sys.executable}" "{SCRIPT}" -m "{model}" -b 1'
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"],
        capture_output=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert result.stdout.count(b"\n") == 1
    assert result.stderr == b""


def test_each_line_is_answered_at_once(model: Path) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, "-m", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(60, process.kill)  # where lines are held back, readline waits
        watch.start()
        for text in SOURCES[:3]:
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait() == 0
        watch.cancel()


def test_on_a_terminal_only_translations_go_to_standard_output(model: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, SCRIPT, "-m", model],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # Tests that run in the background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        watch = threading.Timer(60, process.kill)  # else a failed assertion would wait for ever
        watch.start()
        os.close(theirs)
        assert process.stdout is not None and process.stderr is not None
        assert b"Ctrl-D" in process.stderr.readline()
        os.write(ours, b"the man\n")
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait() == 130
        watch.cancel()
        os.close(ours)
        rest = process.stderr.read()
    assert first.strip()
    assert rest == b""


def test_imports_nothing_that_it_does_not_use(model: Path) -> None:
    unused = ["hydra", "datasets", "sacrebleu", "tensorboard", "matplotlib", "pandas", "pyarrow"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['translate.py', '-m', {str(model)!r}, 'the man']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        f"print(sorted(set({unused!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=ENVIRONMENT, timeout=120
    )
    assert result.stderr.decode().strip() == "[]"


def test_help_needs_no_model_and_no_torch() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['translate.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=ENVIRONMENT)
    assert result.stderr.strip() == b"False"
    for option in ("--model", "--beam-size", "--n-best", "--scores", "--device", "--input"):
        assert option.encode() in result.stdout
