import pytest, torch, torch.distributed as dist, time, os
from tests.support.spawn import run_distributed
def ok(rank, n, k):
    t=torch.tensor([rank+1.0]); dist.all_reduce(t); return t*k
def bad(rank,n):
    if rank==1: raise KeyError("boom")
    dist.barrier()
def slow(rank,n): time.sleep(30)
def die(rank,n): 
    if rank==0: os._exit(7)
    dist.barrier()
def test_ok():
    t0=time.time()
    r=run_distributed(ok,3,2.0); assert [x.item() for x in r]==[12,12,12]; print(time.time()-t0)
def test_bad():
    with pytest.raises(RuntimeError, match="boom"): run_distributed(bad,2)
def test_slow():
    with pytest.raises(TimeoutError): run_distributed(slow,2,timeout_s=8)
def test_die():
    with pytest.raises(RuntimeError, match="exit code 7"): run_distributed(die,2)
