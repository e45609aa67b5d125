"""One Redis: connections, retries and scripts; and whether the server is still the one that it was.

Redis answers before what it was told is safe: one that crashed, or its replica that took over, may lack the last
writes, or all. It then is another run of the server, which every new connection asks for before it is used.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, NoScriptError, TimeoutError
from redis.retry import Retry

from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.redis_errors import redis_errors
from services.common.errors import FailedPrecondition

_SCRIPTS = Path(__file__).with_name("lua")
_BACKOFF_SECONDS = 0.05
_BACKOFF_MOST_SECONDS = 1.0


class RedisServer:
    """Safe in several threads; connects when it is first asked. Every method raises as redis_errors.py has it."""

    def __init__(self, config: RedisConfig) -> None:
        self.config = config
        self._runs = 0
        self._run_id = ""
        self._lock = threading.Lock()
        self._scripts = {path.stem: _Script(path.read_text()) for path in _SCRIPTS.glob("*.lua")}
        self._client = Redis(
            host=config.host,
            port=config.port,
            db=config.db,
            username=config.username or None,
            password=config.password or None,
            decode_responses=True,
            protocol=2,  # what every server and proxy speaks, and a user without rights to HELLO
            socket_connect_timeout=config.connect_timeout,
            socket_timeout=config.timeout,
            socket_keepalive=True,
            retry=Retry(ExponentialWithJitterBackoff(_BACKOFF_MOST_SECONDS, _BACKOFF_SECONDS), config.retries),
            retry_on_error=[BusyLoadingError, ConnectionError, TimeoutError],
            redis_connect_func=cast("Callable[[], None]", self._on_connect),  # called with the connection
            ssl=config.tls,
            ssl_ca_certs=config.ca_certs or None,
            ssl_certfile=config.certfile or None,
            ssl_keyfile=config.keyfile or None,
        )
        self._execute: Callable[..., Any] = self._client.execute_command

    @property
    def runs(self) -> int:
        """How many runs of the server this process has met."""
        return self._runs

    def check(self) -> None:
        """Refuse a server that would throw parts of an index away. Raises FailedPrecondition, Unavailable."""
        info = self("INFO", "memory")
        policy = str(info.get("maxmemory_policy", ""))
        if int(info.get("maxmemory", 0)) and policy.startswith("allkeys"):
            raise FailedPrecondition(
                "INDEX_EVICTED",
                f"the Redis on {self.config.where} has maxmemory-policy {policy} and so may evict parts of the index; "
                "set it to noeviction or volatile-lru",
            )

    def __call__(self, *command: Any) -> Any:
        with redis_errors(self.config.where):
            return self._execute(*command)

    def pipeline(self, *commands: Sequence[Any], atomic: bool = False) -> list[Any]:
        """All answers, in one round trip."""
        with redis_errors(self.config.where), self._client.pipeline(transaction=atomic) as pipe:
            add: Callable[..., Any] = pipe.execute_command
            for command in commands:
                add(*command)
            answers: list[Any] = pipe.execute()
            return answers

    def script(self, name: str, keys: Sequence[str], *arguments: Any) -> Any:
        """Run `<name>.lua`. It touches the keys it is given, and no others."""
        script = self._scripts[name]
        with redis_errors(self.config.where):
            try:
                return self._execute("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except NoScriptError:  # a server that was started since
                return self._execute("EVAL", script.text, len(keys), *keys, *arguments)

    def close(self) -> None:
        self._client.close()

    def _on_connect(self, connection: Any) -> None:
        connection.on_connect()
        connection.send_command("INFO", "server", check_health=False)
        lines = str(connection.read_response()).splitlines()
        run_id = next((line.partition(":")[2] for line in lines if line.startswith("run_id:")), "")
        with self._lock:
            # a server that does not tell is another one at each connection, to be sure
            if run_id != self._run_id or not run_id:
                self._runs += 1
                self._run_id = run_id


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def new_id() -> str:
    return secrets.token_hex(8)
