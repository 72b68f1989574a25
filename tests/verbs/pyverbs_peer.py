"""One of two processes that write to each other with immediate data, by pyverbs alone.

    pyverbs_peer.py DEVICE GID_INDEX TEXT IMMEDIATE

Its own address goes to stdout as a line of JSON and the other's is read from stdin.
Writes TEXT with IMMEDIATE into the other's memory, and prints what it is written.
"""

import json
import sys
import time

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

ROOM = 64  # bytes; what we send comes first, what we are sent behind it
HANG_GUARD_S = 150.0


def main(device: str, gid_index: int, text: str, immediate: int) -> None:
    context = Context(name=device)
    pd = PD(context)
    memory = MR(pd, 2 * ROOM, e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)
    queue = CQ(context, 8)
    qp = QP(pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=queue, rcq=queue, cap=QPCap(max_recv_wr=4)))
    mine = {"number": qp.qp_num, "gid": str(context.query_gid(1, gid_index)), "memory": memory.buf,
            "rkey": memory.rkey}
    print(json.dumps(mine), flush=True)
    other = json.loads(sys.stdin.readline())

    attributes = QPAttr(port_num=1)
    attributes.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
    attributes.dest_qp_num = other["number"]
    attributes.path_mtu = e.IBV_MTU_1024
    attributes.min_rnr_timer = 12
    attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 14, 7, 7
    route = GlobalRoute(dgid=GID(other["gid"]), sgid_index=gid_index)
    attributes.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
    qp.to_init(attributes)
    # It wants a place for data even where there will be none.
    qp.post_recv(RecvWR(num_sge=1, sg=[SGE(memory.buf + ROOM, ROOM, memory.lkey)]))
    qp.to_rts(attributes)
    print("ready", flush=True)
    sys.stdin.readline()  # the other is ready too

    data = text.encode()
    memory.write(data, len(data))
    wr = SendWR(opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, sg=[SGE(memory.buf, len(data), memory.lkey)],
                imm_data=immediate, send_flags=e.IBV_SEND_SIGNALED)
    wr.set_wr_rdma(other["rkey"], other["memory"] + ROOM)
    qp.post_send(wr)

    deadline = time.monotonic() + HANG_GUARD_S
    sent, arrived = False, None
    while not sent or arrived is None:
        assert time.monotonic() < deadline, "nothing came"
        count, completions = queue.poll(1)
        for completion in completions[:count]:
            assert completion.status == e.IBV_WC_SUCCESS, completion
            if completion.opcode == e.IBV_WC_RECV_RDMA_WITH_IMM:
                length = completion.byte_len
                arrived = {"text": memory.read(length, ROOM).decode(), "immediate": completion.imm_data}
            else:
                sent = True
    print(json.dumps(arrived), flush=True)
    sys.stdin.readline()  # our queue pair stays until the other has all it waits for


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
