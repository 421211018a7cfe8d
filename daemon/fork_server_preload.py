"""Loaded by multiprocessing's fork server, which takes no function, only a module to import."""

from daemon.fork_server import prepare

prepare()
