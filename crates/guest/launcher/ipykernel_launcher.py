"""Starts ipykernel as a cell wants it: no output lost silently, a history that ends with it, no debugger. Started by the guest, with Python 3.8 or later."""

import codecs
import contextlib
import contextvars
import functools
import importlib.util
import os
import select
import sys
import threading
import types

# Characters of text that may wait to be sent before whoever prints waits for that.
UNSENT = 256 * 1024
# Most bytes that are in a pipe at once.
PIPE = 64 * 1024


def import_in_parts(name, *parts):
    """A package whose own content is imported with the first name that is taken from it and is in none of its modules `parts`, the light ones first."""
    spec = importlib.util.find_spec(name)

    class Package(types.ModuleType):
        def __getattr__(self, wanted):
            for part in parts:
                module = importlib.import_module(f"{name}.{part}")
                if hasattr(module, wanted):
                    return getattr(module, wanted)
            self.__class__ = types.ModuleType
            spec.loader.exec_module(self)
            return getattr(self, wanted)

    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[name].__class__ = Package


def let_threads_keep_their_cell():
    """What a thread prints belongs to the cell that started it, however late it comes."""
    start = threading.Thread.start

    @functools.wraps(start)
    def start_in_context(self, *arguments, **options):
        self.run = functools.partial(contextvars.copy_context().run, self.run)
        return start(self, *arguments, **options)

    threading.Thread.start = start_in_context


def let_print_wait(stream):
    """Text is sent by another thread; code that prints faster than that would fill the memory with it."""
    write = stream.write

    @functools.wraps(write)
    def write_in_parts(self, string):
        if not isinstance(string, str):
            return write(self, string)
        for at in range(0, len(string) or 1, UNSENT):
            part = string[at : at + UNSENT]
            write(self, part)
            self.unsent = getattr(self, "unsent", 0) + len(part)
            if self.unsent >= UNSENT:
                self.unsent = 0
                self.flush()
        return len(string)

    stream.write = write_in_parts


def let_flush_drain(stream):
    """What was printed past Python is taken up by another thread, which may come late: after the end of the cell it belongs to. So
    the main thread takes up what there is when it flushes, as it does before it ends a cell."""
    make, flush = stream.__init__, stream.flush

    @functools.wraps(make)
    def make_with_lock(self, *arguments, **options):
        self.taking = threading.RLock()
        self.is_taking = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        make(self, *arguments, **options)

    def is_waiting(self, milliseconds):
        # Not select: it can't look at descriptors above 1023, and code may have opened as many.
        poll = select.poll()
        poll.register(self._fid, select.POLLIN)
        return bool(poll.poll(milliseconds))

    def take_up(self):
        """False once nothing can come any more."""
        with self.taking:
            # Writing may flush.
            if self.is_taking or not is_waiting(self, 0):
                return True
            self.is_taking = True
            try:
                taken = os.read(self._fid, PIPE)
                self.write(self.decoder.decode(taken))
                os.write(self._original_stdstream_copy, taken)
            finally:
                self.is_taking = False
        return bool(taken)

    def watch(self):
        try:
            while is_waiting(self, None) and self._should_watch and take_up(self):
                pass
        except Exception:
            self._exc = sys.exc_info()

    @functools.wraps(flush)
    def flush_all(self):
        # Not a copy of the kernel that `os.fork` has made, nor a thread of an earlier cell: what there is, is not theirs.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self._should_watch and self._is_master_process():
            # Code may have closed it.
            with contextlib.suppress(OSError):
                take_up(self)
        flush(self)

    stream.__init__, stream._watch_pipe_fd, stream.flush = make_with_lock, watch, flush_all


if __name__ == "__main__":
    os.umask(0o077)
    # As with `python -m`: what lies beside this file is not to be imported. IPython puts the working folder first by itself.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    # A third of the boot is spent on importing a debugger that nobody can reach. ipykernel does without one that it can't import.
    sys.modules["debugpy"] = None
    # Of the clients' package a kernel needs messages and connection files, and, before version 8, asks it for its version meanwhile.
    import_in_parts("jupyter_client", "_version", "connect")

    import tempfile

    import traitlets
    import zmq
    from IPython.core.interactiveshell import InteractiveShell
    from ipykernel.iostream import OutStream
    from ipykernel.kernelapp import IPKernelApp

    # Python finds out by writing a file; on a full disk it finds nothing, and then every execution fails for want of a name.
    tempfile.tempdir = os.environ.get("TMPDIR") or "/tmp"
    # What code prints is seen within 20 ms, not within 200.
    OutStream.flush_interval = 0.02

    class CellKernelApp(IPKernelApp):
        # A kernel makes no clients, and naming their class would import them all.
        blocking_class = traitlets.Type(object)

        def init_iopub(self, context):
            class Context:
                @staticmethod
                def socket(kind):
                    socket = context.socket(kind)
                    # Above so many waiting messages the kernel waits for the guest instead of dropping them (PUB takes it too). There are
                    # few, for each may be long.
                    socket.setsockopt(zmq.XPUB_NODROP, 1)
                    socket.setsockopt(zmq.SNDHWM, 8)
                    return socket

            super().init_iopub(Context)

        def init_kernel(self):
            super().init_kernel()
            # User code may import it.
            sys.modules.pop("debugpy", None)

        def start(self):
            # Not before: threads of the kernel's own take up what was printed past Python, for whatever cell runs then.
            let_threads_keep_their_cell()
            super().start()
            # Code may stop the loop that it runs in; the kernel's end is another matter.
            while not (self.shell.exit_now or self.kernel._shutdown_message):
                self.io_loop.start()

    # Since version 9 IPython keeps all that was ever printed, for a magic that writes notebooks.
    if hasattr(InteractiveShell, "_tee"):
        InteractiveShell._tee = lambda self, channel: contextlib.nullcontext()
    let_print_wait(OutStream)
    let_flush_drain(OutStream)
    CellKernelApp.launch_instance(argv=[*sys.argv[1:], "--HistoryManager.hist_file=:memory:"])
