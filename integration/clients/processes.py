"""A pool of processes, begun in each way that there is, opens the device that the parent has listed."""

import ctypes
import multiprocessing
import os
import sys

library = ctypes.CDLL("libibverbs.so.1", use_errno=True)
library.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
library.ibv_open_device.restype = ctypes.c_void_p
library.ibv_open_device.argtypes = [ctypes.c_void_p]
library.ibv_close_device.argtypes = [ctypes.c_void_p]
library.ibv_alloc_pd.restype = ctypes.c_void_p
library.ibv_alloc_pd.argtypes = [ctypes.c_void_p]

count = ctypes.c_int()
# What is begun anew imports this module, and lists for itself.
devices = library.ibv_get_device_list(ctypes.byref(count))


def errno_name():
    return os.strerror(ctypes.get_errno())


def work(number):
    context = library.ibv_open_device(devices[0])
    if not context:
        return f"ibv_open_device: {errno_name()}"
    if not library.ibv_alloc_pd(context):
        return f"ibv_alloc_pd: {errno_name()}"
    return ""


if __name__ == "__main__":
    assert count.value == 1, f"{count.value} devices"
    for method in "fork", "forkserver", "spawn":
        # The parent has it open, too, or not.
        context = library.ibv_open_device(devices[0]) if method != "spawn" else None
        with multiprocessing.get_context(method).Pool(3) as pool:
            wrong = [failure for failure in pool.map(work, range(12)) if failure]
        if wrong:
            sys.exit(f"{method}: {wrong}")
        assert work(0) == ""
        if context:
            library.ibv_close_device(context)
