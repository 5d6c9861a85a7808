//! What is told of a card, or of a machine with one, that is not as a proxy needs it: each with a line that says what to do. The card
//! is one that is not there (`verbs-proxy/ibverbs/tests/provider.c`).

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::command::{Running, command, run, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client, netns, sandbox, suite};
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::card::Description;
use ringfence_trials::Trial;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// More than anything here takes by far.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let needs = Needs {
        programs: &["cc", "sleep", "setpriv", "prlimit", "ip"],
        built: &[artifacts::ibverbs_proxy, artifacts::library],
    };
    suite::main("ringfence-cards", &needs, || {
        let trials: Vec<Trial> = vec![
            test("a_library_that_cannot_be_loaded", broken_library),
            test("a_library_that_is_too_old", old_library),
            test("too_little_locked_memory", little_memory),
            test("a_policy_that_grants_more_than_the_card_has", beyond_the_card),
            test("a_gid_index_that_the_container_has_not", no_such_gid),
            test("no_gid_for_the_containers_addresses", no_own_gid),
            test("a_card_is_described", described),
            test("what_the_kernel_says_of_the_card_is_told_in_the_containers_terms", kernels_terms),
        ];
        Ok(trials)
    })
}

fn refusal(node: &Node) -> Result<String> {
    Ok(format!("{:#}", node.proxy(Limits::default()).err().context("it started")?))
}

fn broken_library() -> Result<()> {
    let library = sandbox::work_dir().join("broken/libibverbs.so.1");
    std::fs::create_dir_all(library.parent().context("has a parent")?)?;
    std::fs::write(&library, "no library\n")?;
    let said = refusal(&Node::with_card("test0", Some(&library))?)?;
    ensure!(
        said.contains("a device of kind ibverbs needs rdma-core (Debian: libibverbs1 and ibverbs-providers)"),
        "{said}"
    );
    Ok(())
}

fn old_library() -> Result<()> {
    let source = sandbox::work_dir().join("old.c");
    std::fs::write(
        &source,
        "void *ibv_get_device_list(int *count);\nvoid *ibv_get_device_list(int *count) { return *count = 0, (void *)0; }\n",
    )?;
    let library = sandbox::work_dir().join("old/libibverbs.so.1");
    std::fs::create_dir_all(library.parent().context("has a parent")?)?;
    let (target, source) = (library.to_string_lossy(), source.to_string_lossy());
    run(command(&["cc", "-fPIC", "-shared", "-Wl,-soname,libibverbs.so.1", "-o", &target, &source]))?;
    let said = refusal(&Node::with_card("test0", Some(&library))?)?;
    ensure!(said.contains("the installed rdma-core is too old; version 33 or later is needed"), "{said}");
    Ok(())
}

/// The lines that a node's proxies logged; there is no journal here.
fn await_line(node: &Node, words: &str) -> Result<()> {
    let log = || std::fs::read_to_string(node.dir().join("proxies.jsonl")).unwrap_or_default();
    wait_until(words, LIMIT, || log().contains(words)).with_context(log)
}

fn with_provider() -> Result<Node> {
    Node::with_card("test0", Some(&client::provider()?))
}

fn little_memory() -> Result<()> {
    let node =
        with_provider()?.run_by(&["setpriv", "--bounding-set=-sys_resource", "prlimit", "--memlock=65536:65536"]);
    let _proxy = node.proxy(Limits::default())?;
    await_line(
        &node,
        "the proxy may lock 65536 bytes of memory, and its container may register 17179869184 (max-mr-bytes): raise",
    )
}

fn beyond_the_card() -> Result<()> {
    let node = with_provider()?;
    let _proxy = node.proxy(Limits { max_qp: 1_000_000, ..Limits::default() })?;
    await_line(&node, "the policy grants more than RDMA device test0 has: max-qp = 1000000, of which it has ")
}

fn connect(proxy: &DirectProxy, index: &str) -> Result<String> {
    let mut command = proxy.command(&client::compile("gid_index", &[])?)?;
    command.arg(index);
    Ok(Running::start(command)?.wait(LIMIT)?.success()?.trim().to_owned())
}

fn no_such_gid() -> Result<()> {
    let node = with_provider()?;
    let proxy = node.proxy(Limits::default())?;
    let found = connect(&proxy, "0")?;
    ensure!(found == "ok", "{found}");
    let found = connect(&proxy, "77")?;
    ensure!(found == "Invalid argument", "{found}");
    let found = connect(&proxy, "7")?;
    ensure!(found == "No data available", "{found}");
    await_line(&node, "a queue pair was to send from GID index 77, where the container's table has none")?;
    await_line(&node, "a queue pair was to send from GID index 7, where")
}

/// A network namespace without an address.
fn no_own_gid() -> Result<()> {
    let netns = netns::alone()?;
    let mut node = with_provider()?;
    node.in_netns(&netns);
    let _proxy = node.proxy(Limits::default())?;
    await_line(
        &node,
        "has no GID yet that is an address of the container's network namespace: give the container an interface of",
    )
}

fn described() -> Result<()> {
    let describe = |name: &str| -> Result<std::process::Output> {
        let library = client::provider()?;
        let mut command = Command::new(artifacts::ibverbs_proxy()?);
        command.args(["--describe", name, "1"]).env("LD_LIBRARY_PATH", library.parent().unwrap_or(Path::new("/")));
        Ok(command.output()?)
    };
    let found: Description = serde_json::from_slice(&describe("test0")?.stdout)?;
    ensure!(
        found.name == "test0"
            && found.max_qp > 0
            && found.max_mr_bytes > 0
            && !found.gids.is_empty()
            && found.pkeys == ["0xffff"],
        "{found:?}"
    );
    let refused = describe("mlx5_9")?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("no RDMA device has the name mlx5_9: there is test0"), "{said}");
    Ok(())
}

fn kernels_terms() -> Result<()> {
    let node = with_provider()?;
    let proxy = node.proxy(Limits::default())?;
    let found = Running::start(proxy.command(&client::compile("card_index", &[])?)?)?.wait(LIMIT)?.success()?;
    // The card's table has something at each odd index, first of somebody else: the container's own begin at 3. How many there are, and
    // which comes first in the container, depends on the machine's addresses.
    let words: Vec<&str> = found.split_whitespace().collect();
    let ["40:", "255", "255", "255", first, "255", second, "7", "255"] = words[..] else { bail!("{found}") };
    let places = ["0", "1", "2"];
    ensure!(places.contains(&first) && first != second, "{found}");
    ensure!(places.contains(&second) || (first, second) == ("0", "255"), "{found}");
    Ok(())
}
