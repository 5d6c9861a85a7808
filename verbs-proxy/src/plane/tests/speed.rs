//! What messages cost both sides, without applications: run by hand with `--release --ignored`.

use super::*;
use rustix::time::{ClockId, clock_gettime};

/// Of this thread, in nanoseconds: the machine may be busy with other things.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn sends(length: u32) -> f64 {
    let (mut two, mut a, mut b) = TwoRigs::new();
    two.share(0);
    let rounds = if length > 1000 { 3_000 } else { 30_000 };
    const BATCH: u64 = 16;
    let start = cpu_time();
    for _ in 0..rounds {
        for wr_id in 0..BATCH {
            b.receive.push(&ReceiveBase::pack(wr_id, 1, two.rigs[1].sge(0, length)).0);
            let flags = if wr_id + 1 == BATCH { SendFlags::SIGNALED } else { SendFlags(0) };
            post(&mut a, &SendFields { flags, ..two.rigs[0].fields(Opcode::SEND, 0, 0, length) });
        }
        two.rigs[0].plane.now += 1000;
        two.rigs[1].plane.now += 1000;
        let mut done = 0;
        let mut got = 0;
        while done < 1 || got < BATCH {
            two.rigs[0].plane.activate(0);
            two.rigs[0].plane.turn();
            two.rigs[1].plane.turn();
            for (rig, count) in [(0, &mut done), (1, &mut got)] {
                let rig = &mut two.rigs[rig];
                while let Some(words) = rig.completions.peek() {
                    let completion = Completion::unpack(&words);
                    assert_eq!(completion.status, WcStatus::SUCCESS);
                    rig.completions.advance(1);
                    *count += 1;
                }
                rig._cq.header::<ringfence_protocol::layout::CqHeader>(0).set_consumed(rig.completions.position());
            }
        }
    }
    (cpu_time() - start) / (rounds * BATCH) as f64
}

#[test]
#[ignore = "measures"]
fn what_a_send_costs_both_sides() {
    for length in [8, 64, 512, 4096, 65_536] {
        let best = (0..5).map(|_| sends(length)).fold(f64::MAX, f64::min);
        println!("SEND {length}: {best:.0} ns");
    }
}
