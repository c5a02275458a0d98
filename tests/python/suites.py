"""Runs Python's own test suites with each server behind the gateway and each client in front of it.

The suites have client and server in one process, on loopback, which is never captured. A socket belongs to the
network namespace in which it was made. So a socket that is bound is made anew, with the same options and under the
same descriptor, in the server's namespace, and one that connects after all goes back. HOST is an address of that
namespace. The suites themselves are read as they are; only addresses of loopback in them become HOST.

    suites.py NETNS HOST4 HOST6 RESULTS CHOICE...

NETNS is the path of the server's namespace. CHOICE is a module, a class or a test, or `-NAME` to leave out what has
NAME in its identifier. RESULTS gets a JSON object for each test when it begins and when it has ended, so that what
hangs is known by name.
"""

import ast
import ctypes
import errno
import faulthandler
import importlib.abc
import importlib.machinery
import json
import os
import socket
import struct
import sys
import time
import unittest
import weakref

SO_NETNS_COOKIE = 71
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
CLONE_NEWNET = 0x40000000
# Seconds that a test may take; then all stacks are shown and the run ends.
TEST_LIMIT = 60

INET = (socket.AF_INET, socket.AF_INET6)
# What can be set before bind(), and its size in bytes.
OPTIONS = [
    (socket.SOL_SOCKET, option, size)
    for option, size in [
        (socket.SO_REUSEADDR, 4),
        (socket.SO_REUSEPORT, 4),
        (socket.SO_KEEPALIVE, 4),
        (socket.SO_BROADCAST, 4),
        (socket.SO_DONTROUTE, 4),
        (socket.SO_LINGER, 8),
        (socket.SO_OOBINLINE, 4),
        (socket.SO_RCVLOWAT, 4),
        (socket.SO_RCVTIMEO, 16),
        (socket.SO_SNDTIMEO, 16),
        (socket.SO_PRIORITY, 4),
    ]
]
TCP_OPTIONS = [
    (socket.IPPROTO_TCP, option, 4)
    for option in [
        socket.TCP_NODELAY,
        socket.TCP_MAXSEG,
        socket.TCP_CORK,
        socket.TCP_KEEPIDLE,
        socket.TCP_KEEPINTVL,
        socket.TCP_KEEPCNT,
        socket.TCP_DEFER_ACCEPT,
        socket.TCP_USER_TIMEOUT,
        socket.TCP_QUICKACK,
    ]
]
IP_OPTIONS = [
    (socket.IPPROTO_IP, option, 4)
    for option in [socket.IP_TOS, socket.IP_TTL, socket.IP_RECVTOS, socket.IP_MULTICAST_TTL, socket.IP_MULTICAST_LOOP]
]
IPV6_OPTIONS = [
    (socket.IPPROTO_IPV6, option, 4)
    for option in [
        socket.IPV6_V6ONLY,
        socket.IPV6_UNICAST_HOPS,
        socket.IPV6_TCLASS,
        socket.IPV6_RECVTCLASS,
        socket.IPV6_RECVHOPLIMIT,
        socket.IPV6_RECVPKTINFO,
        socket.IPV6_RECVRTHDR,
        socket.IPV6_RECVHOPOPTS,
        socket.IPV6_RECVDSTOPTS,
    ]
]
BUFFERS = [(socket.SO_SNDBUF, SO_SNDBUFFORCE), (socket.SO_RCVBUF, SO_RCVBUFFORCE)]


class Split:
    """Where sockets are made."""

    def __init__(self, netns):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.there = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        with socket.socket() as probe:
            self.cookie = self.cookie_of(probe)
        # The methods of the C class, which SSLSocket and asyncio reach through socket.socket.
        base = socket.socket.__mro__[1]
        self.real = {name: getattr(base, name) for name in ("bind", "connect", "connect_ex")}
        self.connects = 0
        self.under_way = weakref.WeakSet()

    @staticmethod
    def cookie_of(sock):
        return sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)

    def enter(self, netns):
        # A thread has its own namespace: nobody else notices.
        if self.libc.setns(netns, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def remake(self, sock, netns):
        """The socket, not yet bound, in another namespace, under the same descriptor."""
        self.enter(netns)
        try:
            fresh = socket.socket(sock.family, sock.type, sock.proto)
        finally:
            self.enter(self.here)
        with fresh:
            options = OPTIONS + (IPV6_OPTIONS if sock.family == socket.AF_INET6 else IP_OPTIONS)
            if sock.type == socket.SOCK_STREAM:
                options = options + TCP_OPTIONS
            for level, option, size in options:
                value = sock.getsockopt(level, option, size)
                if value != fresh.getsockopt(level, option, size):
                    fresh.setsockopt(level, option, value)
            for option, force in BUFFERS:
                value = sock.getsockopt(socket.SOL_SOCKET, option)
                if value != fresh.getsockopt(socket.SOL_SOCKET, option):
                    # The kernel doubles what it is given (socket(7)).
                    fresh.setsockopt(socket.SOL_SOCKET, force, value // 2)
            os.set_blocking(fresh.fileno(), os.get_blocking(sock.fileno()))
            os.dup2(fresh.fileno(), sock.fileno(), os.get_inheritable(sock.fileno()))

    def suits(self, sock, address):
        return (
            sock.family in INET
            and sock.type in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
            and isinstance(address, tuple)
            and sock.fileno() >= 0
        )

    def is_bound(self, sock):
        return sock.getsockname()[1] != 0

    def before_bind(self, sock, address):
        if self.suits(sock, address) and not self.is_bound(sock) and self.cookie_of(sock) == self.cookie:
            self.remake(sock, self.there)

    def before_connect(self, sock, address):
        """Whether the connection begins in front of the gateway."""
        if not self.suits(sock, address) or sock.type != socket.SOCK_STREAM:
            return False
        if self.cookie_of(sock) == self.cookie:
            return True
        try:
            sock.getpeername()
            return False
        except OSError:
            pass
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        # It was bound to the address that it connects from; here, only its port means something.
        port = sock.getsockname()[1]
        self.remake(sock, self.here)
        # An earlier test's connection from this port may not be forgotten yet. The kernel's own choices for this
        # namespace are other ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.real["bind"](sock, ("", port))
        return True

    def count(self, sock, result):
        """Counts a connection that begins; another call goes on with one that has begun, or tells its end."""
        if result == errno.EISCONN:
            return
        if sock not in self.under_way:
            self.connects += 1
        if result in (errno.EINPROGRESS, errno.EALREADY):
            self.under_way.add(sock)
        else:
            self.under_way.discard(sock)

    def install(self):
        split = self

        def bind(self, address):
            split.before_bind(self, address)
            return split.real["bind"](self, address)

        def connecting(name):
            real = split.real[name]

            def connect(self, address):
                begins = split.before_connect(self, address)
                try:
                    done = real(self, address)
                except OSError as error:
                    # A name without an address is none of the kernel's business.
                    if begins and not isinstance(error, socket.gaierror):
                        split.count(self, error.errno)
                    raise
                if begins:
                    split.count(self, done or 0)
                return done

            connect.__name__ = name
            return connect

        socket.socket.bind = bind
        socket.socket.connect = connecting("connect")
        socket.socket.connect_ex = connecting("connect_ex")


class Addresses(ast.NodeTransformer):
    """Loopback's addresses become HOST: anywhere, or only where something is bound or connected to them."""

    CALLS = {"bind", "connect", "connect_ex", "create_server", "create_connection", "echo_client"}

    def __init__(self, host4, host6, anywhere):
        self.host4, self.host6, self.anywhere = host4, host6, anywhere
        self.inside = 0

    def visit_Constant(self, node):
        if not isinstance(node.value, str) or not (self.anywhere or self.inside):
            return node
        if node.value == "::1":
            return ast.copy_location(ast.Constant(self.host6), node)
        if "127.0.0.1" in node.value:
            return ast.copy_location(ast.Constant(node.value.replace("127.0.0.1", self.host4)), node)
        return node

    def visit_Call(self, node):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return self.within(node, name in self.CALLS)

    def visit_Assign(self, node):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return self.within(node, names == ["host"])

    def within(self, node, is_address):
        self.inside += is_address
        self.generic_visit(node)
        self.inside -= is_address
        return node


class Loader(importlib.machinery.SourceFileLoader):
    hosts = None

    def source_to_code(self, data, path, **options):
        tree = ast.parse(data, path)
        anywhere = self.name.startswith("test.test_asyncio")
        tree = ast.fix_missing_locations(Addresses(*self.hosts, anywhere).visit(tree))
        return super().source_to_code(tree, path, **options)

    def get_code(self, fullname):
        # Never what an earlier run without this loader has compiled, nor anything for a later one.
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class Finder(importlib.abc.MetaPathFinder):
    SUITES = ("test.test_socket", "test.test_ssl", "test.test_asyncio", "test.ssl_servers")

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith(self.SUITES):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(fullname, spec.origin)
        return spec


class Results(unittest.TestResult):
    """One line for each test's begin and end."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def say(self, **line):
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()

    def startTest(self, test):
        super().startTest(test)
        self.outcome, self.detail = "ok", ""
        self.began = time.monotonic()
        self.say(test=test.id())
        faulthandler.dump_traceback_later(TEST_LIMIT, exit=True)

    def stopTest(self, test):
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        took = round(time.monotonic() - self.began, 3)
        self.say(test=test.id(), outcome=self.outcome, detail=self.detail, took=took)

    def note(self, test, outcome, detail):
        if hasattr(self, "outcome"):
            self.outcome, self.detail = outcome, detail
        else:
            # A class or a module that cannot be set up.
            self.say(test=test.id(), outcome=outcome, detail=detail, took=0.0)

    def addError(self, test, err):
        super().addError(test, err)
        self.note(test, "error", self.errors[-1][1])

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note(test, "failure", self.failures[-1][1])

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.note(test, "failure", "".join(map(str, err[:2])))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self.note(test, "expected failure", "")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note(test, "unexpected success", "")


def each(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from each(item)
        else:
            yield item


def main():
    netns, host4, host6, results, *choice = sys.argv[1:]
    split = None
    if netns != "-":
        split = Split(netns)
        split.install()
        Loader.hosts = (host4, host6)
        sys.meta_path.insert(0, Finder())
        import test.support.socket_helper as helper

        helper.HOST, helper.HOSTv4, helper.HOSTv6 = host4, host4, host6
    out = [c[1:] for c in choice if c.startswith("-")]
    names = [c for c in choice if not c.startswith("-")]
    tests = unittest.defaultTestLoader.loadTestsFromNames(names)
    chosen = unittest.TestSuite(t for t in each(tests) if not any(o in t.id() for o in out))
    with open(results, "w") as file:
        result = Results(file)
        chosen.run(result)
        result.say(ran=result.testsRun, connects=split.connects if split else 0)


if __name__ == "__main__":
    main()
