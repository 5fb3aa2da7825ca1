"""MT-bench's judgments, by a small server that speaks as OpenAI's endpoints do."""

import contextlib
import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import hear_interrupts

from hedgerow.benchmarks import judge_prompts, judging

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a blog.", "Make it shorter."]},
    {
        "question_id": 111,
        "category": "math",
        "turns": ["What is 1 + 1?", "And 2 + 2?"],
        "reference": ["It is 2.", "It is 4."],
    },
    {
        "question_id": 103,
        "category": "reasoning",
        "turns": ["Why is it so?", "And if not?"],
        "reference": ["For a reason.", ""],
    },
]
BROKEN_OFF = b'{"choices": ['
KEY = "sk-very-secret-1234567890"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(model):
    """A line for each question; the second turn's answer says whose it is."""
    return [
        {
            "question_id": q["question_id"],
            "answer_id": f"{model}-{q['question_id']}",
            "model_id": model,
            "choices": [
                {"index": 0, "turns": [f"{model} first {i}", f"{model} second {i}"]}
                for i in [q["question_id"]]
            ],
            "tstamp": 1.0,
        }
        for q in QUESTIONS
    ]


class Endpoint:
    """A server on this machine; `reply` decides what it says to each request."""

    def __init__(self):
        self.requests = []
        self.headers = []
        self.reply = lambda user, number: "It is fine. Rating: [[7]]"
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(payload)
                    names = {name.lower(): value for name, value in self.headers.items()}
                    endpoint.headers.append(names | {"path": self.path})
                    number = len(endpoint.requests)
                user = payload["messages"][1]["content"]
                answer = endpoint.reply(user, number)
                if callable(answer):  # which writes it itself, until who has asked is gone
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        answer(self)
                    return
                status, body = answer if isinstance(answer, tuple) else (200, completion(answer))
                missing = 10 if body == BROKEN_OFF else 0
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/v2/chat/completions")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) + missing))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = bool(missing)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=[0.01], daemon=True).start()

    def users(self):
        return [payload["messages"][1]["content"] for payload in self.requests]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def completion(text):
    return json.dumps(
        {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}]}
    ).encode()


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "question.jsonl", QUESTIONS)
    write(tmp_path / "one.jsonl", answers_of("one"))
    write(tmp_path / "two.jsonl", answers_of("two"))
    return tmp_path


@pytest.fixture
def judge(hedgerow, endpoint, files, monkeypatch):
    """Judge the answers of `one`."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(*arguments):
        command = ["mt-bench", "judge", files / "one.jsonl"]
        command += ["--questions", files / "question.jsonl", "--endpoint", endpoint.url]
        return hedgerow(*command, "--model", "j-4", "--out", files / "out.jsonl", *arguments)

    return run


def numbers(result, title):
    """The numbers in a row of the table."""
    [row] = [line for line in result.out.splitlines() if f" {title} " in line]
    return [float(cell) for cell in row.split("│")[2:-1] if cell.strip()]


# --- single answers -------------------------------------------------------------------------------


def test_ratings_are_asked_for_as_published(judge, endpoint, files):
    result = judge()
    assert result.code == 0, result.err
    assert len(endpoint.requests) == 6
    for payload, headers in zip(endpoint.requests, endpoint.headers, strict=True):
        assert (payload["model"], payload["temperature"], payload["max_tokens"]) == ("j-4", 0, 2048)
        assert [message["role"] for message in payload["messages"]] == ["system", "user"]
        assert headers["path"] == "/v1/chat/completions"
        assert headers["authorization"] == f"Bearer {KEY}"
    systems = {p["messages"][1]["content"]: p["messages"][0]["content"] for p in endpoint.requests}
    rows = {(row["question_id"], row["turn"]): row for row in lines(files / "out.jsonl")}
    assert {key: row["judge"][1] for key, row in rows.items()} == {
        (81, 1): "hedgerow-single-v1",
        (81, 2): "hedgerow-single-v1-multi-turn",
        (111, 1): "hedgerow-single-math-v1",
        (111, 2): "hedgerow-single-math-v1-multi-turn",
        (103, 1): "hedgerow-single-math-v1",
        (103, 2): "hedgerow-single-v1-multi-turn",
    }
    for row in rows.values():
        assert set(row) == {
            "question_id",
            "model",
            "judge",
            "user_prompt",
            "judgment",
            "score",
            "turn",
            "tstamp",
        }
        assert (row["model"], row["judge"][0], row["score"]) == ("one", "j-4", 7)
        system, user = systems[row["user_prompt"]], row["user_prompt"]
        task = user if row["turn"] == 1 else system
        assert '"[[rating]]"' in task
        assert "impartial judge" in task
        assert (system == "You are a helpful assistant.") == (row["turn"] == 1)
    first, second = rows[111, 1]["user_prompt"], rows[111, 2]["user_prompt"]
    for section in [
        "[Question]\nWhat is 1 + 1?\n\n",
        "[The Start of Reference Answer]\nIt is 2.\n[The End of Reference Answer]",
        "[The Start of Assistant's Answer]\none first 111\n[The End of Assistant's Answer]",
    ]:
        assert section in first
    assert "2 + 2" not in first
    reference = [
        "<|The Start of Reference Answer|>",
        "### User:\nWhat is 1 + 1?",
        "### Reference answer:\nIt is 2.",
        "### User:\nAnd 2 + 2?",
        "### Reference answer:\nIt is 4.",
        "<|The End of Reference Answer|>",
    ]
    conversation = [
        "<|The Start of Assistant A's Conversation with User|>",
        "### User:\nWhat is 1 + 1?",
        "### Assistant A:\none first 111",
        "### User:\nAnd 2 + 2?",
        "### Assistant A:\none second 111",
        "<|The End of Assistant A's Conversation with User|>",
    ]
    assert second == "\n\n\n".join(map("\n\n".join, (reference, conversation)))
    assert "Reference" not in rows[81, 1]["user_prompt"] + rows[81, 2]["user_prompt"]
    assert "judged without a right answer, as there is none: 103" in result.out


def test_scores_are_averaged_by_turn_and_category(judge, endpoint):
    def reply(user, number):
        turn = 2 if "Conversation with User" in user else 1
        base = {"81": 2, "111": 5, "103": 9}
        [score] = [value for key, value in base.items() if f"first {key}" in user]
        return f"Well.\n\nRating: [[{score + (turn == 2) / 2}]]"

    endpoint.reply = reply
    result = judge()
    assert numbers(result, "writing") == [2, 2.5, 2.25]
    assert numbers(result, "math") == [5, 5.5, 5.25]
    assert numbers(result, "overall") == [pytest.approx(16 / 3, abs=1e-3), 5.833, 5.583]


def test_what_was_judged_is_not_asked_again(judge, endpoint, files):
    assert judge().code == 0
    assert len(endpoint.requests) == 6
    before = (files / "out.jsonl").read_bytes()
    result = judge()
    assert (result.code, len(endpoint.requests)) == (0, 6)
    assert "6 judgments, 6 of them were there" in result.out
    assert (files / "out.jsonl").read_bytes() == before
    assert judge("--model", "another").code == 0  # another judge
    assert len(endpoint.requests) == 12
    rows = answers_of("one")
    rows[0]["choices"][0]["turns"][1] = "changed"
    write(files / "one.jsonl", rows)
    assert judge().code == 0  # one answer is another, in one turn's prompt
    assert len(endpoint.requests) == 13
    (files / "out.jsonl").write_bytes(before[:-20])  # a kill in the last line
    write(files / "one.jsonl", answers_of("one"))
    assert judge().code == 0
    assert len(endpoint.requests) == 14
    assert [row["turn"] for row in lines(files / "out.jsonl")].count(1) == 3


def test_a_failing_request_is_tried_again_then_left_for_the_next_time(judge, endpoint, files):
    broken = {"first 111": (500, b'{"error": {"message": "no luck"}}')}
    endpoint.reply = lambda user, number: next(
        (answer for part, answer in broken.items() if part in user), "[[4]]"
    )
    result = judge()
    assert result.code == 1
    assert "2 of 6 judgments failed (as question 111, turn " in result.err
    assert "500" in result.err
    assert "no luck" in result.err
    assert "given again, they go on" in result.err
    assert numbers(result, "overall") == [4, 4, 4]
    assert len(endpoint.requests) == 4 + 2 * (1 + judging._RETRIES)
    assert len(lines(files / "out.jsonl")) == 4
    broken.clear()
    before = len(endpoint.requests)
    result = judge()
    assert (result.code, len(endpoint.requests) - before) == (0, 2)
    assert "6 judgments, 4 of them were there" in result.out


def test_a_request_that_fails_once_is_only_tried_again(judge, endpoint):
    seen = set()

    def reply(user, number):
        if user in seen:
            return "[[4]]"
        seen.add(user)
        return 503, b"{}"

    endpoint.reply = reply
    assert judge().code == 0
    assert len(endpoint.requests) == 12


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (BROKEN_OFF, "peer closed connection"),
        (completion("[[5]]" + " " * judging._LARGEST_REPLY), "more than 1,000,000 bytes"),
    ],
)
def test_a_reply_or_an_error_that_has_no_end(
    judge, endpoint, files, monkeypatch, status, body, words
):
    monkeypatch.setattr(judging, "_RETRIES", 0)
    endpoint.reply = lambda user, number: (status, body)
    result = judge()
    assert result.code == 1
    assert "6 of 6 judgments failed" in result.err
    assert words in result.err
    assert not (files / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "not a chat completion"),
        (b'{"choices": []}', "not a chat completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "not a chat completion"),
        (b'{"choices": [{"message": {"content": ["[[5]]"]}}]}', "not a chat completion"),
    ],
)
def test_garbage_is_no_judgment(judge, endpoint, files, body, words):
    endpoint.reply = lambda user, number: (200, body)
    result = judge()
    assert result.code == 1
    assert "6 of 6 judgments failed" in result.err
    assert words in result.err
    assert not (files / "out.jsonl").exists()


def test_a_judgment_without_a_rating_does_not_count(judge, endpoint, files):
    endpoint.reply = lambda user, number: "Fine." if "first 81" in user else "[[8]]"
    result = judge()
    assert result.code == 0
    scores = {(r["question_id"], r["turn"]): r["score"] for r in lines(files / "out.jsonl")}
    assert scores[81, 1] == scores[81, 2] == -1
    assert "2 judgments could not be understood and do not count" in result.out
    assert numbers(result, "writing") == []
    assert numbers(result, "overall") == [8, 8, 8]
    asked = len(endpoint.requests)
    assert judge().code == 0
    assert len(endpoint.requests) == asked  # the judge would say the same again


def test_several_are_asked_at_once(judge, endpoint):
    """The server answers nobody before three have asked."""
    barrier = threading.Barrier(3)

    def reply(user, number):
        barrier.wait(timeout=60)
        return "[[3]]"

    endpoint.reply = reply
    assert judge("--parallel", 3).code == 0
    assert len(endpoint.requests) == 6


def test_references_come_from_a_file_first(judge, endpoint, files):
    rows = [row for row in answers_of("gpt-4") if row["question_id"] != 81]
    write(files / "references.jsonl", rows)
    assert judge("--references", files / "references.jsonl").code == 0
    users = [user for user in endpoint.users() if "Reference" in user]
    assert len(users) == 4
    assert all("gpt-4 first" in user and "It is 2." not in user for user in users)
    assert sum("gpt-4 second" in user for user in users) == 2


def head(*lines):
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode()


def silent(handler):
    """No answer, as long as who has asked is there."""
    handler.connection.recv(1)


def slow_headers(handler):
    handler.connection.sendall(head()[:-4] + b"\r\nX-Slow: ")
    slow(handler)


def slow_body(handler):
    handler.connection.sendall(head("Content-Length: 1000000"))
    slow(handler)


def slow(handler):
    while True:
        handler.connection.sendall(b"a")
        time.sleep(0.02)


def zipped(handler):
    body = gzip.compress(b" " * 50_000_000)
    size = f"Content-Length: {len(body)}"
    handler.connection.sendall(head("Content-Encoding: gzip", size) + body)


def packed(handler):
    handler.connection.sendall(head("Content-Encoding: zstd", "Content-Length: 3") + b"abc")


def endless_body(handler):
    handler.connection.sendall(head("Connection: close"))
    while True:
        handler.connection.sendall(b" " * 100_000)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (silent, "there is no whole answer after 0.3 seconds"),
        (slow_headers, "there is no whole answer after 0.3 seconds"),
        (slow_body, "there is no whole answer after 0.3 seconds"),
        (zipped, "the answer has more than 1,000,000 bytes"),
        (packed, "the answer is packed as zstd, which is not read"),
        (endless_body, "the answer has more than 1,000,000 bytes"),
    ],
    ids=lambda answer: getattr(answer, "__name__", ""),
)
def test_an_answer_that_comes_slowly_or_does_harm(
    judge, endpoint, files, monkeypatch, answer, words
):
    seconds = 0.3 if "seconds" in words else 600
    monkeypatch.setattr(judging, "_SECONDS", seconds)
    monkeypatch.setattr(judging, "_RETRIES", 0)
    endpoint.reply = lambda user, number: answer
    result = judge()
    assert result.code == 1
    assert "6 of 6 judgments failed (as question " in result.err
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not (files / "out.jsonl").exists()
    endpoint.reply = lambda user, number: "[[6]]"
    monkeypatch.setattr(judging, "_SECONDS", 600)
    assert judge().code == 0


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://[", "gopher://other/", "//other/"])
def test_nobody_is_sent_to_another_place(judge, endpoint, monkeypatch, place):
    def redirect(handler):
        answer = head(f"Location: {place}", "Content-Length: 0").replace(b"200 OK", b"302 Found")
        handler.connection.sendall(answer)

    monkeypatch.setattr(judging, "_RETRIES", 0)
    endpoint.reply = lambda user, number: redirect
    result = judge()
    assert result.code in (1, 2)
    assert result.err.count("\n") == 1
    assert "redirects to" in result.err or "Invalid URL in location" in result.err


def test_a_rating_that_is_out_of_bounds_is_nobodys(judge, endpoint, files):
    endpoint.reply = lambda user, number: f"Rating: [[{'0' * 5000}7]] [[1e999]]"
    result = judge()
    assert result.code == 0, result.err
    assert "6 judgments could not be understood and do not count" in result.out
    for score in ("1e999", "11", "NaN"):
        rows = (files / "out.jsonl").read_text()
        (files / "other.jsonl").write_text(rows.replace('"score":-1', f'"score":{score}', 1))
        assert (files / "other.jsonl").read_text() != rows
        result = judge("--out", files / "other.jsonl")
        assert (result.code, "other.jsonl line 1" in result.err) == (2, True)


@pytest.mark.parametrize(("answer", "times"), [(silent, 3), (slow_body, 1)])
def test_ctrl_c_ends_it_at_once(endpoint, files, answer, times):
    asked = threading.Event()

    def reply(user, number):
        if number == 2:
            asked.set()
        return answer if number > 1 else "[[7]]"

    endpoint.reply = reply
    command = ["mt-bench", "judge", files / "one.jsonl", "--questions", files / "question.jsonl"]
    command += ["--endpoint", endpoint.url, "--model", "j-4", "--out", files / "out.jsonl"]
    running = subprocess.Popen(
        [sys.executable, "-m", "hedgerow", *map(str, command), "--parallel", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_interrupts,
    )
    asked.wait()
    for _ in range(times):
        running.send_signal(signal.SIGINT)
    shown, _ = running.communicate()
    sentence = "hedgerow: interrupted: given again, the same command does what is missing\n"
    # The last of several may come when the process has nothing left to do.
    ended = [(130, sentence), *[(-signal.SIGINT, each) for each in ("", sentence) if times > 1]]
    assert (running.returncode, shown) in ended
    assert len(lines(files / "out.jsonl")) == 1


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_are_shown_in_both_orders(judge, endpoint, files):
    """A judge that prefers `one` on writing wherever it stands, and whoever is first elsewhere."""

    def reply(user, number):
        one_is_a = user.index("one first") < user.index("two first")
        if "first 81" in user:
            return f"So my verdict is [[{'A' if one_is_a else 'B'}]]"
        return "[[A]]" if "first 111" in user else "[[C]]"

    endpoint.reply = reply
    result = judge("--against", files / "two.jsonl")
    assert result.code == 0, result.err
    assert len(endpoint.requests) == 12
    rows = {(row["question_id"], row["turn"]): row for row in lines(files / "out.jsonl")}
    assert [rows[81, turn]["g1_winner"] for turn in (1, 2)] == ["model_1", "model_1"]
    assert [rows[81, turn]["g2_winner"] for turn in (1, 2)] == ["model_1", "model_1"]
    assert [rows[111, 1][f"g{game}_winner"] for game in (1, 2)] == ["model_1", "model_2"]
    assert rows[103, 2]["g1_winner"] == rows[103, 2]["g2_winner"] == "tie"
    assert {row["judge"][1] for row in rows.values()} == {
        "hedgerow-pair-v1",
        "hedgerow-pair-v1-multi-turn",
        "hedgerow-pair-math-v1",
        "hedgerow-pair-math-v1-multi-turn",
    }
    for row in rows.values():
        assert {"question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge"} < set(row)
        assert {"g1_judgment", "g2_judgment", "turn", "tstamp"} < set(row)
        assert (row["model_1"], row["model_2"]) == ("one", "two")
        number = row["question_id"]
        for game, (a, b) in {"g1": ("one", "two"), "g2": ("two", "one")}.items():
            user = row[f"{game}_user_prompt"]
            if row["turn"] == 1:
                for letter, who in (("A", a), ("B", b)):
                    title = f"Assistant {letter}'s Answer]"
                    assert (
                        f"[The Start of {title}\n{who} first {number}\n[The End of {title}" in user
                    )
            else:
                for letter, who in (("A", a), ("B", b)):
                    assert f"### Assistant {letter}:\n{who} second {number}\n\n<|The End" in user
    assert "<|The Start of Reference Answer|>" in rows[111, 2]["g1_user_prompt"]
    assert numbers(result, "writing") == [2, 0, 0, 100]
    assert numbers(result, "math") == [0, 2, 0, 50]
    assert numbers(result, "turn 1") == [1, 2, 0, pytest.approx(66.67)]
    assert numbers(result, "overall") == [2, 4, 0, pytest.approx(66.67)]
    again = judge("--against", files / "two.jsonl")
    assert (again.code, len(endpoint.requests)) == (0, 12)


def test_a_pair_without_a_verdict_does_not_count(judge, endpoint, files):
    endpoint.reply = lambda user, number: "[[A]] or [[B]]" if "first 81" in user else "[[C]]"
    result = judge("--against", files / "two.jsonl")
    assert "2 judgments could not be understood" in result.out
    assert numbers(result, "overall") == [0, 4, 0, 50]
    assert {row["g1_winner"] for row in lines(files / "out.jsonl")} == {"error", "tie"}


def test_a_file_of_ratings_takes_no_pairs(judge, endpoint, files):
    assert judge().code == 0
    before = (files / "out.jsonl").read_bytes()
    result = judge("--against", files / "two.jsonl")
    assert (result.code, "out.jsonl line 1" in result.err) == (2, True)
    assert (files / "out.jsonl").read_bytes() == before
    assert len(endpoint.requests) == 6


# --- the key --------------------------------------------------------------------------------------


def test_the_key_is_never_written(judge, endpoint, files):
    """Also where the endpoint repeats it, in a judgment or an error."""
    endpoint.reply = lambda user, number: (
        (500, json.dumps({"error": {"message": f"bad {KEY}"}}).encode())
        if "first 81" in user
        else f"You sent {KEY}. [[6]]"
    )
    result = judge()
    assert result.code == 1
    assert KEY not in result.out + result.err
    for path in files.iterdir():
        assert KEY not in path.read_text()
    assert "bad [key]" in result.err


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (302, ["302", "redirects"]),
        (307, ["307", "redirects"]),
        (401, ["401", "key in OPENAI_API_KEY"]),
        (403, ["403", "key"]),
        (404, ["404", "/v1"]),
    ],
)
def test_a_refusal_stops_at_once(judge, endpoint, files, status, words):
    endpoint.reply = lambda user, number: (status, b'{"error": {"message": "go away"}}')
    result = judge("--parallel", 1)
    assert result.code == 2
    assert all(word in result.err for word in [endpoint.url, "go away", *words])
    assert len(endpoint.requests) <= 2
    assert not (files / "out.jsonl").exists()


def test_a_local_server_needs_no_key_and_another_variable_may_hold_one(
    judge, endpoint, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge().code == 0
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer none"}
    monkeypatch.setenv("MY_KEY", "sk-mine")
    assert judge("--model", "other", "--key-variable", "MY_KEY").code == 0
    assert endpoint.headers[-1]["authorization"] == "Bearer sk-mine"
    monkeypatch.setenv("MY_KEY", "sk-mine\n")
    result = judge("--model", "third", "--key-variable", "MY_KEY")
    assert (result.code, "MY_KEY" in result.err, "sk-mine" in result.err) == (2, True, False)


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_in_files(judge, endpoint, files, monkeypatch):
    def check(*words, arguments=()):
        result = judge(*arguments)
        assert result.code == 2
        assert all(word in result.err for word in words), result.err

    for url in (
        "localhost:8000",
        "http:///v1",
        "http://me:secret@localhost/v1",
        "http://h/v1?k=secret",
    ):
        check("--endpoint: give a URL", "OPENAI_API_KEY", arguments=["--endpoint", url])
        assert "secret" not in judge("--endpoint", url).err
    check("holds answers of one too", arguments=["--against", files / "one.jsonl"])
    check("none.jsonl cannot be read", arguments=["--against", files / "none.jsonl"])
    write(files / "one.jsonl", answers_of("one")[:2])
    check("one.jsonl", "no two answers to question 103")
    write(files / "one.jsonl", [*answers_of("one"), *answers_of("two")])
    check("one.jsonl", "answers of one, two")
    write(files / "one.jsonl", [answers_of("one")[0] | {"choices": []}])
    check("one.jsonl line 1", "choices")
    assert endpoint.requests == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check("pip install 'hedgerow[judge]'")


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[7.5]] rather than [[8]]", 7.5),
        ("Rating: [10]", 10),
        ("[1] first [[9]]", 9),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("[[rating]]", -1),
        ("[[-3]]", -1),
        ("[[٣]]", -1),
        ("[[1e1]]", -1),
        ("[[1e999]]", -1),
        (f"[[{'0' * 5000}7]]", -1),
        (f"[[{'9' * 5000}]]", -1),
        (f"[[7.{'0' * 5000}]]", -1),
        ("", -1),
    ],
)
def test_ratings_that_are_read(judgment, score):
    assert judging.rating(judgment) == score


@given(st.text(), st.integers(10, 100), st.text())
def test_a_rating_is_read_from_whatever_surrounds_it(before, tenths, after):
    before = before.replace("[", "(")
    score = tenths / 10
    assert judging.rating(f"{before}[[{score:g}]]{after}") == score


@given(st.text(st.sampled_from("[]0123456789.ABC ")))
def test_any_text_has_a_rating_in_range_or_none(text):
    assert judging.rating(text) == -1 or 1 <= judging.rating(text) <= 10
    assert judging.verdict(text, "model_1", "model_2") in ("model_1", "model_2", "tie", "error")


@given(st.lists(st.text(), min_size=2, max_size=2), st.lists(st.text(), min_size=2, max_size=2))
def test_what_is_judged_is_never_read_as_a_template(questions, answers):
    prompt = judge_prompts.single(questions, answers, [])
    assert f"### Assistant A:\n{answers[1]}\n\n<|The End" in prompt.user
    swapped = judge_prompts.pair(questions, answers, ["{x}", "%s"], ["{a}", "{b}"])
    assert "### Assistant B:\n%s\n\n<|The End" in swapped.user
