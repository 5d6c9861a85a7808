//! The cases: programs of integration/clients/applications and of the distribution, as commands for a container's shell.

use ringfence_integration::node::applications::PROGRAMS;

/// The status of a case that cannot be run where it is (`topic.h`).
pub const UNSUPPORTED: i32 = 77;

/// What a case needs beyond what a container always has; some surroundings take it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Little,
    /// Some tens of threads and descriptors: run times of languages.
    Much,
    /// That no other library is preloaded: sanitizers, valgrind and allocators of its own choice.
    NoPreload,
}

/// Something to run in a container.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name. Not two have the same.
    pub name: String,
    /// What it may take, on a machine that is busy with other things.
    pub seconds: u64,
    /// For the shell.
    pub command: String,
    /// What it needs.
    pub needs: Needs,
    /// All that it may say, if that matters.
    pub says: Option<&'static str>,
}

impl Case {
    /// A case that ends well in a minute, whatever it says.
    pub fn new(name: impl Into<String>, command: impl Into<String>) -> Self {
        Self { name: name.into(), seconds: 60, command: command.into(), needs: Needs::Little, says: None }
    }

    /// The same with other needs.
    pub fn needing(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }

    /// The same if nothing else is said, on either output.
    pub fn saying(self, text: &'static str) -> Self {
        Self { says: Some(text), ..self }
    }

    /// The same with another limit.
    pub fn within(self, seconds: u64) -> Self {
        Self { seconds, ..self }
    }

    /// Its line in run-cases.sh's list.
    pub fn line(&self) -> String {
        format!("{}\t{}\t{}\n", self.name, self.seconds, self.command)
    }
}

/// Programs with a case for each name. That a program has no others is a case, too.
const TOPICS: [(&str, &[&str]); 7] = [
    ("allocator", &["calloc_after_free", "calloc_after_dereg", "in_threads", "buffer_grows"]),
    (
        "attributes",
        &[
            "huge_pages",
            "not_dumped",
            "locked",
            "everything_locked",
            "wiped_on_fork",
            "wiped_on_fork_later",
            "not_forked",
            "policy_of_nodes",
        ],
    ),
    (
        "bystanders",
        &[
            "neighbours_write",
            "neighbours_blocked",
            "neighbours_read",
            "neighbours_send",
            "forkwrite",
            "forkblocked",
            "forkread",
            "forksend",
        ],
    ),
    (
        "changes",
        &[
            "dontneed_registered",
            "dontneed_deregistered",
            "dontneed_deregistered_by_the_system_call",
            "dontneed_in_parts",
            "free_advice",
            "remove_advice",
            "realloc_grows",
            "moved_by_mremap",
            "unmapped_in_part",
            "mapped_over",
            "protected_in_part",
            "heap_shrinks",
        ],
    ),
    (
        "descriptors",
        &[
            "daemon",
            "daemon_with_an_open_device",
            "daemon2",
            "closeall_0",
            "closeall_1",
            "wake",
            "channel",
            "fit_for_select",
            "confined",
        ],
    ),
    (
        "forks",
        &[
            "rawfork_fork",
            "rawfork__Fork",
            "rawfork_clone",
            "rawfork_fork_deregistered",
            "rawfork_clone_deregistered",
            "programs",
            "generations",
            "handler_of_faults",
            "handler_that_runs_once",
        ],
    ),
    ("resources", &["fdmr", "vma_upwards", "vma_downwards", "large_deregistered", "past_the_end_of_a_file"]),
];

/// Allocators, and how each gives memory back at once. Their libraries are linked to beside the programs.
const ALLOCATORS: [(&str, &str); 3] = [
    ("jemalloc", "MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0"),
    ("tcmalloc", "TCMALLOC_RELEASE_RATE=100"),
    ("mimalloc", "MIMALLOC_PURGE_DELAY=0"),
];

/// The names that programs load the library by.
const NAMES: [(&str, &str); 6] = [
    ("by its SONAME", "libibverbs.so.1"),
    ("nccl: by the -dev link", "libibverbs.so"),
    ("by the path of its SONAME", "/usr/lib/x86_64-linux-gnu/libibverbs.so.1"),
    ("by the path of its file", "$(realpath /usr/lib/x86_64-linux-gnu/libibverbs.so.1)"),
    ("into a namespace of its own", "new:libibverbs.so.1"),
    ("into a namespace of its own by the -dev link", "new:libibverbs.so"),
];

/// The topics' cases.
pub fn topics() -> Vec<Case> {
    let mut cases = Vec::new();
    for (program, names) in TOPICS {
        let path = format!("{PROGRAMS}/{program}");
        let listed = format!("test \"$({path} list | tr '\\n' ' ')\" = '{} '", names.join(" "));
        cases.push(Case::new(format!("{program}: the list is complete"), listed));
        for name in names {
            cases.push(Case::new(format!("{program}: {name}"), format!("{path} {name}")).within(90));
        }
    }
    cases
}

/// All cases that one container of an engine can run after another.
pub fn all() -> Vec<Case> {
    let mut cases = topics();
    for (name, library) in NAMES {
        cases.push(Case::new(format!("loading: {name}"), format!("{PROGRAMS}/loading \"{library}\"")));
    }
    let vendored = format!("{PROGRAMS}/vendored");
    cases.push(Case::new("loading: a vendored copy that a program is linked to", format!("{vendored}/program works")));
    cases.push(Case::new("loading: a vendored copy, or no device", vendored_copy(&vendored)));
    for (allocator, settings) in ALLOCATORS {
        for name in ["calloc_after_free", "calloc_after_dereg", "in_threads", "buffer_grows"] {
            let command = format!("LD_PRELOAD={PROGRAMS}/{allocator}.so {settings} {PROGRAMS}/allocator {name}");
            cases.push(Case::new(format!("{allocator}: {name}"), command).needing(Needs::NoPreload));
        }
    }
    cases.extend(languages());
    cases.extend(without_verbs());
    cases
}

/// A copy that a program loads by its path need not have our device, but must not crash.
fn vendored_copy(vendored: &str) -> String {
    format!("{PROGRAMS}/loading {vendored}/libibverbz.so.1; status=$?; test $status = 0 || test $status = 3")
}

/// Run times that have threads, signals and collectors of their own.
fn languages() -> Vec<Case> {
    let mut cases = Vec::new();
    for method in ["fork", "forkserver", "spawn"] {
        let command = format!("python3 {PROGRAMS}/multiprocess.py {method}");
        cases
            .push(Case::new(format!("python: multiprocessing by {method}"), command).needing(Needs::Much).saying("ok"));
    }
    let verbs = Case::new("python: pyverbs", format!("python3 {PROGRAMS}/pyverbs_reads.py"));
    cases.push(verbs.needing(Needs::Much).saying("ok"));
    let go = Case::new("go", format!("{PROGRAMS}/verbs-go")).within(120);
    cases.push(go.needing(Needs::Much).saying("ok"));
    let java = format!("java -Xmx256m -cp {PROGRAMS} Verbs {PROGRAMS}/libverbs-java.so");
    cases.push(Case::new("java", java).within(120).needing(Needs::Much).saying("ok"));
    let perftest = "ib_write_bw -F -n 1000 >/dev/null 2>&1 & for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.5; \
                    ib_write_bw -F -n 1000 127.0.0.1 && exit 0; done; exit 1";
    cases.push(Case::new("perftest", perftest));
    cases
}

/// Programs that use no verbs must not notice us, and tools that look closely at processes must work.
fn without_verbs() -> Vec<Case> {
    let hello = |name: &str, program: &str| {
        Case::new(format!("without verbs: {name}"), format!("{PROGRAMS}/{program}")).saying("hello")
    };
    let mut cases = vec![
        hello("an ordinary program", "hello"),
        hello("a static program", "hello-static"),
        // What is preloaded for all others cannot be for this one, and the dynamic linker says so.
        hello("a 32-bit program", "hello-32").needing(Needs::NoPreload),
    ];
    for sanitizer in ["address", "leak", "thread", "undefined"] {
        let case = hello(&format!("-fsanitize={sanitizer}"), &format!("hello-{sanitizer}"));
        cases.push(case.needing(Needs::NoPreload));
    }
    let user = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    // All of its output is one line.
    let setuid = format!(
        "said=\"$({user} su --version 2>&1)\" && echo \"$said\" && test -u /usr/bin/su && case $said in \
                          *'\n'*) false;; 'su from util-linux '*) true;; *) false;; esac"
    )
    .replace("'\n'", "$'\\n'");
    cases.push(Case::new("without verbs: a setuid program", setuid));
    let valgrind = "valgrind --quiet --error-exitcode=9";
    cases.push(
        Case::new("without verbs: valgrind", format!("{valgrind} {PROGRAMS}/hello"))
            .saying("hello")
            .needing(Needs::NoPreload),
    );
    cases.push(
        Case::new("valgrind", format!("{valgrind} {PROGRAMS}/process once")).within(120).needing(Needs::NoPreload),
    );
    let address = format!("{PROGRAMS}/process-address once");
    cases.push(Case::new("-fsanitize=address", address).needing(Needs::NoPreload));
    cases
}
