"""A RabbitMQ node of our own, on loopback, for the demo and the tests.

Owns: finding the distribution's RabbitMQ, the node's folder, ports, environment and processes, and its
life: start, stop, kill, start again with the same data. Needs the standard library only, works as root and
as an ordinary user, and touches nothing of a broker that the machine may already run.

Leaves out: installing RabbitMQ (``ops/install.sh``), speaking AMQP (``daemon/``), and the topology.

    with PrivateBroker(Path("/tmp/broker")) as broker:
        print(broker.amqp_url)  # amqp://guest:guest@127.0.0.1:PORT/%2F
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from daemon.parent_death import child_gets

RABBITMQ_BIN = Path("/usr/lib/rabbitmq/bin")
"""Where Debian and Ubuntu put the real scripts. Those in /usr/sbin switch to the user ``rabbitmq``."""

_LOOPBACK = "127.0.0.1"
_NODENAME = "reeld@localhost"


class PrivateBrokerError(RuntimeError):
    """Raised when the private broker did not start, or a control command failed."""


class RabbitMQMissing(PrivateBrokerError):  # noqa: N818 - read as a statement: RabbitMQ is missing
    """Raised when no RabbitMQ is installed on this machine. Installing it is all there is to do."""


class PrivateBroker:
    """One RabbitMQ node that lives under ``folder`` and dies with this process.

    Its children ask the kernel for a parent-death signal, and that signal follows the *thread* that started
    them: call :meth:`start` from a thread that outlives the broker (the main thread, usually).

    ``config`` is appended to ``rabbitmq.conf``, ``advanced`` is the whole ``advanced.config``; ``env`` adds
    to the node's environment, which otherwise inherits nothing but ``PATH``.

    ``enter`` is for a RabbitMQ that is installed elsewhere: it is asked for the words to put before each command
    of the node, given the folders that the command must see under their own names.
    """

    def __init__(
        self,
        folder: Path,
        *,
        plugins: Iterable[str] = ("rabbitmq_management",),
        config: str = "",
        advanced: str = "",
        env: Mapping[str, str] | None = None,
        rabbitmq_bin: Path = RABBITMQ_BIN,
        enter: Callable[[Sequence[Path]], list[str]] | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.plugins = tuple(plugins)
        self._config = config
        self._advanced = advanced
        self._extra_env = dict(env or {})
        self._bin = rabbitmq_bin
        self._enter = enter
        self._vm: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._notify: _NotifySocket | None = None
        self._has_data = False
        self._pick_ports()

    @property
    def amqp_url(self) -> str:
        """The URL of the default virtual host, for the user ``guest``."""
        return f"amqp://guest:guest@{_LOOPBACK}:{self.amqp_port}/%2F"

    @property
    def management_url(self) -> str | None:
        """The management plugin's base URL without a trailing slash, or None without the plugin."""
        return None if self.management_port is None else f"http://{_LOOPBACK}:{self.management_port}"

    @property
    def pid(self) -> int | None:
        """The process id of the Erlang VM while it runs."""
        return self._vm.pid if self._vm is not None and self._vm.poll() is None else None

    @property
    def log_path(self) -> Path:
        """The node's log, everything it ever printed included."""
        return self.folder / "log" / "broker.log"

    def start(self, *, ready_timeout_seconds: float = 90.0) -> None:
        """Start the node and return once it says READY=1; a second start finds the data of the first.

        Raises :class:`RabbitMQMissing` without RabbitMQ, :class:`PrivateBrokerError` with the last lines of
        the log when the node ends before it is ready or is not ready in time.
        """
        if self.pid is not None:
            raise RuntimeError("the private broker is already running")
        self._forget_vm()  # one that ended by itself
        server = self._require(self._bin / "rabbitmq-server")
        for attempts_left in (2, 1, 0):
            try:
                self._write_files()
                self._start_epmd()
                self._start_vm(server, ready_timeout_seconds)
            except BaseException as error:
                self.stop()
                # Somebody took a port between our choosing and binding it. Only a first start may move: later
                # ones have clients that remember the address.
                port_lost = not self._has_data and not all(_is_free(port) for port in self._ports())
                if isinstance(error, PrivateBrokerError) and port_lost and attempts_left:
                    self._pick_ports()
                    continue
                raise
            self._has_data = True
            return

    def stop(self, *, timeout_seconds: float = 30.0) -> None:
        """Stop the node as an operator would (SIGTERM) and wait; also ends epmd. Stopping twice is fine."""
        if self._vm is not None and self._vm.poll() is None:
            self._vm.terminate()
            try:
                self._vm.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                _kill_group(self._vm)
        self._forget_vm()
        if self._epmd is not None:
            _kill_group(self._epmd)  # it holds nothing worth a clean end
            self._epmd = None

    def kill(self) -> None:
        """End the node like a power cut (SIGKILL); its data stays for the next :meth:`start`.

        Within about a second of *declaring* a quorum queue this loses the queue, confirmed messages
        included (seen on 3.10, 4.0 and 4.3): wait 1.5 s after the declare before killing.
        """
        if self.pid is None or self._vm is None:
            raise RuntimeError("the private broker is not running")
        _kill_group(self._vm)
        self._forget_vm()

    def ctl(self, *args: str, timeout_seconds: float = 60.0) -> str:
        """Run ``rabbitmqctl`` with ``args`` against this node and return what it printed."""
        command = self._command(str(self._require(self._bin / "rabbitmqctl")), *args)
        done = subprocess.run(
            command,
            env=self._environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise PrivateBrokerError(f"rabbitmqctl {' '.join(args)} exited {done.returncode}: {said[-1]}")
        return done.stdout

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _pick_ports(self) -> None:
        amqp, dist, epmd, management = free_ports(4)
        self.amqp_port: int = amqp
        self.management_port: int | None = management if "rabbitmq_management" in self.plugins else None
        self._dist_port = dist
        self._epmd_port = epmd

    def _ports(self) -> list[int]:
        management = [] if self.management_port is None else [self.management_port]
        return [self.amqp_port, self._dist_port, self._epmd_port, *management]

    def _command(self, *words: str) -> list[str]:
        if self._enter is None:
            return list(words)
        folders = [self.folder] if self._notify is None else [self.folder, self._notify.path.parent]
        return [*self._enter(folders), *words]

    def _require(self, script: Path) -> Path:
        if self._enter is None and not os.access(script, os.X_OK):
            raise RabbitMQMissing(
                f"RabbitMQ is not installed ({script} is missing):"
                " run `sudo apt-get install --no-install-recommends rabbitmq-server`"
            )
        return script

    def _write_files(self) -> None:
        for name in ("home", "log", "mnesia", "generated"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lines = [
            "disk_free_limit.absolute = 16MB",  # a full laptop must not raise the disk alarm in a demo
            "log.console = true",
            "log.console.use_colors = off",
            "log.file = false",
        ]
        if self.management_port is not None:
            lines += [f"management.tcp.ip = {_LOOPBACK}", f"management.tcp.port = {self.management_port}"]
        (self.folder / "rabbitmq.conf").write_text("\n".join([*lines, self._config, ""]))
        (self.folder / "advanced.config").write_text(self._advanced or "[].\n")
        (self.folder / "rabbitmq-env.conf").write_text("")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin".lstrip(":"),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",  # rabbitmqctl warns on every call otherwise
            "HOME": str(folder / "home"),  # the Erlang cookie is made there: nobody else's is read or changed
            "ERL_CRASH_DUMP": str(folder / "log" / "erl_crash.dump"),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": _LOOPBACK,
            # For every Erlang program of this node: the VM, rabbitmqctl, and the short-lived VM that
            # RabbitMQ starts to look for epmd. Each would listen on all interfaces.
            "ERL_AFLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_NODENAME": _NODENAME,
            "RABBITMQ_NODE_IP_ADDRESS": _LOOPBACK,
            "RABBITMQ_NODE_PORT": str(self.amqp_port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(folder / "feature_flags"),
            "RABBITMQ_PID_FILE": str(folder / "broker.pid"),
            **self._extra_env,
        }

    def _start_epmd(self) -> None:
        """Start Erlang's port mapper first: a VM that finds none leaves one behind as an orphan daemon."""
        if self._epmd is not None and self._epmd.poll() is None:
            return
        environment = self._environment()
        epmd = "epmd" if self._enter else shutil.which("epmd", path=environment["PATH"])
        if epmd is None:
            raise RabbitMQMissing(
                "Erlang is not installed (no epmd on the PATH):"
                " run `sudo apt-get install --no-install-recommends rabbitmq-server`"
            )
        with self.log_path.open("ab") as log:
            command = self._command(epmd, "-port", str(self._epmd_port), "-address", _LOOPBACK)
            self._epmd = _spawn(command, environment, self.folder, log)
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline and self._epmd.poll() is None:
            try:
                socket.create_connection((_LOOPBACK, self._epmd_port), timeout=1.0).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise PrivateBrokerError(f"epmd did not answer on port {self._epmd_port}\n{self._log_tail()}")

    def _start_vm(self, server: Path, ready_timeout_seconds: float) -> None:
        # Kept while the VM runs: it also says STOPPING=1, and reports an error if nobody is there to hear it.
        self._notify = _NotifySocket()
        # With a notify socket the script replaces itself by the VM, so our child *is* the broker.
        environment = {**self._environment(), "NOTIFY_SOCKET": str(self._notify.path)}
        with self.log_path.open("ab") as log:
            self._vm = _spawn(self._command(str(server)), environment, self.folder, log)
        self._wait_ready(self._vm, self._notify, ready_timeout_seconds)

    def _wait_ready(self, vm: subprocess.Popen[bytes], notify: "_NotifySocket", timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if "READY=1" in notify.receive(wait_seconds=0.1):
                return
            if vm.poll() is not None:
                raise PrivateBrokerError(
                    f"RabbitMQ exited with status {vm.returncode} before it was ready;"
                    f" the end of {self.log_path}:\n{self._log_tail()}"
                )
        raise PrivateBrokerError(
            f"RabbitMQ was not ready after {timeout_seconds:g} s; the end of {self.log_path}:\n{self._log_tail()}"
        )

    def _forget_vm(self) -> None:
        self._vm = None  # its helpers (name lookup, disk watch) end by themselves as its pipes close
        if self._notify is not None:
            self._notify.close()
            self._notify = None

    def _log_tail(self, lines: int = 60) -> str:
        # Sixty: after the line with the reason, RabbitMQ still prints its crash report, some forty lines.
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"


class _NotifySocket:
    """The receiving end of sd_notify(3), in a folder of its own: a socket's path has room for 107 bytes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="reeld-broker-"))
        self.path = self._folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))

    def receive(self, *, wait_seconds: float) -> list[str]:
        """The assignments of the next message, or none after ``wait_seconds``."""
        self._socket.settimeout(wait_seconds)
        try:
            return self._socket.recv(4096).decode(errors="replace").splitlines()
        except TimeoutError:
            return []

    def close(self) -> None:
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _spawn(command: list[str], environment: dict[str, str], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own (Ctrl-C stays ours), to be killed when this thread ends."""
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=child_gets(signal.SIGKILL),
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    """``count`` different ports that are free on loopback, below the range that the kernel gives to clients.

    A client that keeps connecting to a broker that is down can be given the broker's own port as its source,
    and then connects to itself: so no port from that range.
    """
    first_client_port = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, first_client_port) if first_client_port >= 12_000 else range(20_000, 32_768)
    ports: list[int] = []
    for port in random.SystemRandom().sample(candidates, min(len(candidates), 200 * count)):
        if len(ports) == count:
            break
        if _is_free(port):
            ports.append(port)
    if len(ports) < count:
        raise PrivateBrokerError("no free TCP ports on 127.0.0.1")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True
