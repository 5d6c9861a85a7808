//! Many containers, one after the other and at once: nothing is left, and nothing grows.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::tests;
use std::process::{Child, ExitCode, Stdio};

fn main() -> ExitCode {
    ringfence_trials::main(tests![five_hundred_in_a_row, sixty_four_at_once,])
}

const IN_A_ROW: usize = 500;
const AT_ONCE: usize = 64;

fn start(lab: &Lab, id: &str) -> Child {
    let mut command = lab.runc_command();
    command.args(["run", id]).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn mounts() -> usize {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count()
}

fn five_hundred_in_a_row() {
    with_lab(|lab| {
        lab.script("cat /etc/ld.so.preload");
        lab.write_config();
        let before = mounts();
        let begin = std::time::Instant::now();
        for i in 0..IN_A_ROW {
            // Ids come back, as an engine's with a restart policy.
            let id = format!("{}-{}", lab.id, i % 50);
            let output = start(lab, &id).wait_with_output().unwrap();
            assert_eq!(succeeded(&output), "/etc/ld.so.ringfence/preload-like-libasan.so\n", "start {i}");
        }
        println!("{IN_A_ROW} containers in {:?}", begin.elapsed());
        assert_eq!(mounts(), before);
    });
}

fn sixty_four_at_once() {
    with_lab(|lab| {
        lab.script("cat /etc/ld.so.preload; sleep 1");
        lab.part_cgroups();
        lab.write_config();
        let before = mounts();
        let containers: Vec<_> = (0..AT_ONCE).map(|i| start(lab, &format!("{}-{i}", lab.id))).collect();
        for container in containers {
            assert_eq!(
                succeeded(&container.wait_with_output().unwrap()),
                "/etc/ld.so.ringfence/preload-like-libasan.so\n"
            );
        }
        assert_eq!(mounts(), before);
        // Those that ended while others were being made are cleaned up after by one that comes later, or by the collection.
        lab.collect();
    });
}
