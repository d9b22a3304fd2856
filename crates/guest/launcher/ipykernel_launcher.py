"""Starts ipykernel as a cell wants it: no output lost silently, no history, no debugger. Started by the guest, with Python 3.8 or later."""

import os
import sys

if __name__ == "__main__":
    os.umask(0o077)
    # As with `python -m`: what lies beside this file is not to be imported. IPython puts the working folder first by itself.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    # A third of the boot is spent on importing a debugger that nobody can reach. ipykernel does without one that it can't import.
    sys.modules["debugpy"] = None

    import zmq
    from ipykernel.iostream import OutStream
    from ipykernel.kernelapp import IPKernelApp

    # What code prints is seen within 20 ms, not within 200.
    OutStream.flush_interval = 0.02

    class CellKernelApp(IPKernelApp):
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
