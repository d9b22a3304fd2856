"""Starts ipykernel as a cell wants it: no output lost silently, no history, no debugger. Started by the guest, with Python 3.8 or later."""

import importlib.util
import os
import sys
import types


def import_in_parts(name, part):
    """A package whose own content is imported with the first name that is taken from it and is not in its module `part`."""
    spec = importlib.util.find_spec(name)

    class Package(types.ModuleType):
        def __getattr__(self, wanted):
            module = importlib.import_module(f"{name}.{part}")
            if hasattr(module, wanted):
                return getattr(module, wanted)
            self.__class__ = types.ModuleType
            spec.loader.exec_module(self)
            return getattr(self, wanted)

    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[name].__class__ = Package


if __name__ == "__main__":
    os.umask(0o077)
    # As with `python -m`: what lies beside this file is not to be imported. IPython puts the working folder first by itself.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    # A third of the boot is spent on importing a debugger that nobody can reach. ipykernel does without one that it can't import.
    sys.modules["debugpy"] = None
    # Of the clients' package a kernel needs messages and connection files.
    import_in_parts("jupyter_client", "connect")

    import traitlets
    import zmq
    from ipykernel.iostream import OutStream
    from ipykernel.kernelapp import IPKernelApp

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
                    # Above 1000 waiting messages the kernel waits for the guest instead of dropping them (PUB takes it too).
                    socket.setsockopt(zmq.XPUB_NODROP, 1)
                    return socket

            super().init_iopub(Context)

        def init_kernel(self):
            super().init_kernel()
            # User code may import it.
            sys.modules.pop("debugpy", None)

    CellKernelApp.launch_instance(argv=[*sys.argv[1:], "--HistoryManager.enabled=False"])
