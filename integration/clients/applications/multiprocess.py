"""Processes of Python's pool open the device that was listed when the module was loaded, and register memory of their own.

    multiprocess.py fork|forkserver|spawn
"""

import ctypes
import multiprocessing
import os
import sys

LENGTH = 1 << 16
LOCAL_WRITE = 1

verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
for name, result, arguments in [
    ("ibv_get_device_list", ctypes.POINTER(ctypes.c_void_p), [ctypes.POINTER(ctypes.c_int)]),
    ("ibv_open_device", ctypes.c_void_p, [ctypes.c_void_p]),
    ("ibv_alloc_pd", ctypes.c_void_p, [ctypes.c_void_p]),
    ("ibv_reg_mr", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]),
    ("ibv_dereg_mr", ctypes.c_int, [ctypes.c_void_p]),
]:
    getattr(verbs, name).restype = result
    getattr(verbs, name).argtypes = arguments

count = ctypes.c_int()
devices = verbs.ibv_get_device_list(ctypes.byref(count))


def valid(what, answer):
    """The answer, which is not NULL."""
    if not answer:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return answer


def work(number):
    """What a process of the pool does: the sum of a buffer that was registered meanwhile."""
    context = valid("ibv_open_device", verbs.ibv_open_device(devices[0]))
    pd = valid("ibv_alloc_pd", verbs.ibv_alloc_pd(context))
    buffer = bytearray([number]) * LENGTH
    address = ctypes.addressof((ctypes.c_char * LENGTH).from_buffer(buffer))
    mr = valid("ibv_reg_mr", verbs.ibv_reg_mr(pd, address, LENGTH, LOCAL_WRITE))
    buffer[0] += 1
    total = sum(buffer)
    if verbs.ibv_dereg_mr(mr) != 0:
        raise OSError("ibv_dereg_mr")
    if sum(buffer) != total:
        raise ValueError("the buffer has changed")
    return total


if __name__ == "__main__":
    if count.value < 1:
        sys.exit("no device")
    multiprocessing.set_start_method(sys.argv[1])
    # The parent uses the device, too, before and after.
    expected = [number * LENGTH + 1 for number in range(6)]
    if work(5) != expected[5]:
        sys.exit("the parent's sum is wrong")
    with multiprocessing.Pool(3) as pool:
        sums = pool.map(work, range(6), chunksize=1)
    if sums != expected:
        sys.exit(f"{sums}, not {expected}")
    if work(5) != expected[5]:
        sys.exit("the parent's sum is wrong afterwards")
    print("ok")
