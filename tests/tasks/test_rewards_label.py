"""Labels from a judge (fact sheet, check 6): a real server on the loopback, both orders, a cache that resumes."""

import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest
from moezoo.cli import main
from moezoo.datasets.rewards_formats import open_files, read_candidates
from moezoo.errors import UserError
from moezoo.tasks.rewards_judges import OpenAIJudge, callable_judge
from moezoo.tasks.rewards_label import CAPABILITIES, TEMPLATE, Question, ask, label, questions, read_cache, verdict

QUALITY = re.compile(r"quality (\d+)")


def wise(text):
    """Prefers the reply of higher quality, whatever its place."""
    first, second = (int(found) for found in QUALITY.findall(text)[:2])
    return "1" if first > second else "2"


def biased(text):
    """Sees a difference of more than 2 only; else the first reply wins."""
    first, second = (int(found) for found in QUALITY.findall(text)[:2])
    return "Reply 2 is better." if second > first + 2 else "Reply 1 is better."


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint; `behave` may return a status to fail with instead of an answer."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.texts, self.keys = answer, [], []
        self.behave = lambda count: None
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            status = self.server.behave(len(self.server.texts))
            if status is None:
                self.server.texts.append(body["messages"][0]["content"])
            self.server.keys.append((self.headers.get("Authorization"), body["model"], self.path))
        if status is None:
            content = self.server.answer(body["messages"][0]["content"])
            reply = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        else:
            reply = {"error": {"message": "no such model"}}
        self.send_response(status or 200)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        server = Server(answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lists(folder, qualities, task="chat", ranks=True):
    rows = [{"prompt": f"question {i}", "responses": [f"quality {q} text {i}{k}" for k, q in enumerate(some)],
             "task": task} | ({"scores": list(some)} if ranks else {}) for i, some in enumerate(qualities)]  # fmt: skip
    path = folder / "lists.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def quality(text):
    return int(QUALITY.search(text)[1])


def test_a_lean_to_the_first_place_is_filtered_out(tmp_path):
    pairs = read_candidates(lists(tmp_path, [(1, 2), (5, 1), (3, 9), (4, 4)]))
    table, report = label(pairs, {"chat": ["logic", "tone"]}, biased, tmp_path / "cache.jsonl")
    assert report.pairs == 8 and report.asked == 16 and report.kept == 4 and report.inconsistent == 4
    assert (
        report.kept_share == 0.5 and report.first_place == 0.75 and report.by_capability == {"logic": 0.5, "tone": 0.5}
    )
    assert report.agreement == pytest.approx(4 / 6)  # of the pairs the file itself does not tie
    assert [(quality(r["chosen"]), quality(r["rejected"]), r["capability"]) for r in table.iter_rows(named=True)] == [
        (5, 1, "logic"), (5, 1, "tone"), (9, 3, "logic"), (9, 3, "tone"),
    ]  # fmt: skip
    steady = label(pairs, {"chat": ["logic"]}, wise, tmp_path / "other.jsonl", "wise")[1]
    assert steady.kept == 3 and steady.agreement == 1.0 and steady.first_place == pytest.approx(0.5, abs=0.13)


def test_both_orders_show_the_same_two_replies(tmp_path):
    pairs = read_candidates(lists(tmp_path, [(1, 2)]))
    one, two = questions(pairs, {"*": ["logic"]}, "j")
    assert (one.swapped, two.swapped) == (False, True) and one.key != two.key
    assert "question 0" in one.text and one.text.count("logic") == 2
    found = [QUALITY.findall(question.text) for question in (one, two)]
    assert found[0] == found[1][::-1] == ["1", "2"]
    assert questions(pairs, {"*": ["logic"]}, "k")[0].key != one.key, "another judge answers otherwise"
    odd = pairs.with_columns(prompt=pl.lit("a {first} brace"), one=pl.lit("{second}"))
    assert "a {first} brace" in questions(odd, {"*": ["x"]}, "j")[0].text
    assert sum(map(len, CAPABILITIES.values())) == 27


def test_answers_are_read_by_the_first_digit_and_else_dropped(tmp_path):
    read = {"1": 0, "Reply 2, not 1": 1, "Answer: 2.": 1, "neither": -1, "12": -1, "Score 10: reply 1": 0}
    assert {answer: verdict(answer) for answer in read} == read
    pairs = read_candidates(lists(tmp_path, [(1, 2), (2, 3)], ranks=False))
    silent = label(pairs, {"*": ["logic"]}, lambda text: "I cannot say", tmp_path / "cache.jsonl")[1]
    assert silent.unparsed == 2 and silent.kept == 0 and silent.kept_share == 0.0
    assert silent.first_place != silent.first_place and silent.agreement != silent.agreement


def test_nothing_is_asked_twice_and_a_broken_run_resumes(tmp_path, serve):
    server = serve(wise)
    judge = OpenAIJudge(server.url, "m", retries=0)
    pairs = read_candidates(lists(tmp_path, [(q, q + 1) for q in range(8)]))
    cache = tmp_path / "cache.jsonl"
    server.behave = lambda count: 500 if count >= 5 else None
    with pytest.raises(UserError, match=r"chat/completions: status 500: .*no such model"):
        label(pairs, {"*": ["logic"]}, judge, cache)
    assert len(read_cache(cache)) == len(server.texts) == 5
    cache.write_bytes(cache.read_bytes() + b'{"key": "torn')  # killed while it wrote
    server.behave = lambda count: None
    table, report = label(pairs, {"*": ["logic"]}, judge, cache, jobs=3)
    assert (report.cached, report.asked, report.kept) == (5, 11, 8) and len(table) == 8
    assert len(server.texts) == len(set(server.texts)) == 16
    again = label(pairs, {"*": ["logic"]}, judge, cache)
    assert again[1].asked == 0 and again[0].equals(table) and len(server.texts) == 16
    assert all(json.loads(line)["capability"] == "logic" for line in cache.read_text().splitlines())


def test_what_is_under_way_when_a_question_fails_is_kept(tmp_path):
    begun = threading.Barrier(2, timeout=10)

    def judge(text):
        begun.wait()
        if QUALITY.findall(text)[0] == "1":
            raise UserError("broken")
        return "2"

    pairs = read_candidates(lists(tmp_path, [(1, 2)]))
    with pytest.raises(UserError, match="broken"):
        label(pairs, {"*": ["logic"]}, judge, tmp_path / "cache.jsonl", jobs=2)
    assert list(read_cache(tmp_path / "cache.jsonl").values()) == ["2"]


def test_a_busy_server_is_asked_again_and_a_wrong_one_is_named(serve):
    server, waits = serve(lambda text: "2"), []
    refused = iter([429, 503])
    server.behave = lambda count: next(refused, None)
    judge = OpenAIJudge(server.url + "/", "m", key="secret", wait=0.5, sleep=waits.append)
    assert judge("hello") == "2" and server.texts == ["hello"]
    assert waits == [0.0, 0.0] and server.keys[-1] == ("Bearer secret", "m", "/v1/chat/completions")
    server.behave = lambda count: 401
    with pytest.raises(UserError, match="status 401") as caught:
        judge("hello")
    assert len(server.keys) == 4 and "secret" not in str(caught.value)
    server.behave, server.answer = lambda count: None, lambda text: None
    with pytest.raises(UserError, match=r"expected choices\[0\].message.content"):
        judge("hello")
    server.shutdown()
    server.server_close()
    slow = OpenAIJudge(server.url, "m", retries=2, wait=0.5, sleep=waits.append)
    with pytest.raises(UserError, match="after 3 tries; is the server up"):
        slow("hello")
    assert waits[2:] == [0.5, 1.0]
    with pytest.raises(UserError, match="--endpoint ftp:x"):
        OpenAIJudge("ftp:x", "m")


def test_the_command_writes_pairs_that_train(tmp_path, serve, capsys, monkeypatch):
    monkeypatch.setenv("MOEZOO_JUDGE_KEY", "k")
    server, out = serve(biased), tmp_path / "labels.jsonl"
    words = ["rewards", "label", lists(tmp_path, [(1, 9), (8, 2), (4, 5)]), "--output", str(out), "--endpoint"]
    words += [server.url, "--model", "m", "--capabilities", "logic, tone", "--jobs", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "kept share" in said and "0.667" in said and "4 pairs written" in said and "without 1 or 2" not in said
    assert server.keys[0][0] == "Bearer k" and len(server.texts) == 12
    report = json.loads((tmp_path / "labels.report.json").read_text())
    assert report["kept"] == 4 and report["judge"] == "m" and report["by_capability"]["logic"] == pytest.approx(2 / 3)
    made = open_files(str(out))
    assert made.tasks == [{"name": "chat", "capabilities": ["logic", "tone"]}] and len(made.pairs) == 4
    assert main(words) == 0 and len(server.texts) == 12


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "who judges"),
        (["--endpoint", "http://localhost:1"], "who judges"),
        (["--judge", "no_such_module:f"], "--judge no_such_module:f: No module"),
        (["--judge", "json:decoder"], "is a module; expected a callable"),
        (["--judge", "json:dumps", "--endpoint", "http://x"], "give one of them"),
        (["--judge", "json:dumps", "--capabilities", "none.yaml"], "none.yaml: no such file"),
        (["--judge", "json:dumps", "--capabilities", ","], "expected names with commas"),
        (["--judge", "json:dumps", "--jobs", "0"], "--jobs 0"),
        (["--judge", "json:dumps"], "task 'law' has no capabilities to ask about; there are those of roleplay"),
        (["--judge", "json:dumps", "--template", "none.txt"], "none.txt: no such file"),
        (["--bad"], "unrecognized arguments: --bad"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, extra, message):
    path = lists(tmp_path, [(1, 2)], task="law")
    assert main(["rewards", "label", path, "--output", str(tmp_path / "out.jsonl"), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_judge_whose_answers_cannot_be_read_is_told_of(tmp_path, capsys):
    template = tmp_path / "t.txt"
    template.write_text("{capability} {prompt} {first} {second}")  # repeated, it names no reply
    words = ["rewards", "label", lists(tmp_path, [(3, 4)]), "--output", str(tmp_path / "out.jsonl")]
    words += ["--capabilities", "logic", "--judge", "string:capwords", "--template", str(template)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "0 pairs written" in said and f"1 of 1 had an answer without 1 or 2; all answers are in {tmp_path}" in said


def test_capabilities_and_templates_come_from_files(tmp_path, capsys):
    caps, template = tmp_path / "caps.yaml", tmp_path / "t.txt"
    caps.write_text("law: [precision]\n'*': [tone]\n")
    template.write_text("{capability}|{prompt}|{first}|{second}")
    out = tmp_path / "out.jsonl"
    words = ["rewards", "label", lists(tmp_path, [(1, 2)], task="law"), "--output", str(out), "--judge", "json:dumps"]
    assert main([*words, "--capabilities", str(caps), "--template", str(template)]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in answers} == {
        json.dumps("precision|question 0|quality 1 text 00|quality 2 text 01"),
        json.dumps("precision|question 0|quality 2 text 01|quality 1 text 00"),
    }
    template.write_text("which?")
    assert main([*words, "--capabilities", str(caps), "--template", str(template)]) == 2
    assert "no {capability} in it" in capsys.readouterr().err
    caps.write_text("law: precision")
    assert main([*words, "--capabilities", str(caps)]) == 2
    assert "expected a mapping, task -> list of names" in capsys.readouterr().err


def test_a_damaged_cache_is_named(tmp_path):
    cache = tmp_path / "cache.jsonl"
    cache.write_text('{"key": "a", "answer": "1"}\nrubbish\n{"key": "b", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"cache.jsonl, line 2"):
        read_cache(cache)
    assert read_cache(tmp_path / "none.jsonl") == {}


def test_candidates_of_pairs_keep_which_is_better_but_not_its_place(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"}) for i in range(40))
    )
    table = read_candidates(str(path))
    better = [row[("one", "two")[row["better"]]] for row in table.iter_rows(named=True)]
    assert better == [f"good {i}" for i in range(40)] and 0.2 < table["better"].mean() < 0.8
    with pytest.raises(UserError, match="no two responses to compare"):
        path.write_text(json.dumps({"prompt": "p", "responses": ["a"]}))
        read_candidates(str(path))


def test_callables_are_found_by_name():
    assert callable_judge("json:dumps")("x") == '"x"'
    assert TEMPLATE.count("{capability}") == 2


def test_answers_that_break_off_are_asked_for_again():
    body = json.dumps({"choices": [{"message": {"content": "1"}}]}).encode()
    replies = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf an ans",
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for reply in replies:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        judge = OpenAIJudge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", sleep=lambda seconds: None)
        assert judge("which?") == "1"
        thread.join(10)
    with pytest.raises(UserError, match=r"--endpoint http://127\.0\.0\.1:80a/v1: Port could not be cast"):
        OpenAIJudge("http://127.0.0.1:80a/v1", "m")


def test_a_cache_without_its_last_line_end_is_gone_on_with(tmp_path):
    cache = tmp_path / "answers.jsonl"
    cache.write_text(json.dumps({"key": "other", "answer": "1"}))
    asked = [Question(0, "logic", False, "which?", "mine")]
    assert [answer for _, answer in ask(asked, lambda text: "2", cache)] == ["2"]
    assert read_cache(cache) == {"other": "1", "mine": "2"}
