"""A server on this machine that answers as an OpenAI-compatible one does, for the tests of the judge."""

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Reply = str | tuple[int, str]  # what the assistant says, or a status and a body as it stands


class Chat:
    """Inside the block `url` is served: `reply` is given each request, all of them are kept in `requests`."""

    def __init__(self, reply: Callable[[dict], Reply]):
        self.reply, self.requests, self.keys = reply, [], []

    def __enter__(self) -> "Chat":
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.requests.append(request)
                chat.keys.append(self.headers["Authorization"])
                said = (404, "{}") if self.path != "/v1/chat/completions" else chat.reply(request)
                status, body = said if isinstance(said, tuple) else (200, completion(said))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def completion(said: str | None, finish_reason: str = "stop", **message) -> str:
    """The body of an answer."""
    message = dict(role="assistant", content=said) | message
    choices = [dict(index=0, message=message, finish_reason=finish_reason)]
    return json.dumps(dict(id="1", object="chat.completion", created=0, model="m", choices=choices))


def shown(request: dict) -> dict[str, str]:
    """The texts of a question, by the names that they have there."""
    (message,) = request["messages"]
    parts = re.findall(r"<([a-z]+(?: \d)?) ([0-9a-f]{8})>\n(.*?)\n</\1 \2>", message["content"], re.DOTALL)
    return {name: text for name, _, text in parts}


def alone(monkeypatch) -> None:
    """No key and no address of the environment, no proxy, and one attempt at each request."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("moemla.judge.RETRIES", 0)
