"""rdma-core's own binding for Python: a region is registered, written, read and given back."""

from pyverbs.device import Context, get_device_list
from pyverbs.enums import IBV_ACCESS_LOCAL_WRITE
from pyverbs.mr import MR
from pyverbs.pd import PD

devices = get_device_list()
if not devices:
    raise SystemExit("no device")
with Context(name=devices[0].name.decode()) as context:
    attributes = context.query_device()
    if attributes.max_qp < 1 or attributes.max_mr < 1:
        raise SystemExit(f"no queue pairs or regions: {attributes}")
    with PD(context) as pd, MR(pd, 1 << 16, IBV_ACCESS_LOCAL_WRITE) as region:
        region.write("ringfence", 9)
        if region.read(9, 0) != b"ringfence":
            raise SystemExit(f"read {region.read(9, 0)!r}")
print("ok")
