//! The command as its users see it.

mod configuration;
mod drain;
mod explain;
mod node;
mod state;
mod stats;

use node::{Node, json};
use ringfence_trials::tests;
use std::io::Read;
use std::process::{ExitCode, Stdio};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        help_of_every_subcommand_shows_examples,
        the_version_names_the_commit,
        completions_and_pages_know_every_subcommand,
        who_reads_the_output_may_stop,
        who_reads_the_errors_may_have_stopped,
        configuration::cdi_devices_are_the_profiles_and_go_stale,
        configuration::drop_ins_count,
        configuration::the_configuration_is_shown_and_checked,
        configuration::info_names_devices_and_policies,
        configuration::info_says_what_a_policy_can_grant_of_a_card,
        explain::explain_refuses_as_the_hook_does,
        explain::explain_tells_all_values_as_json,
        explain::explain_goes_by_the_hook_that_the_bundle_names,
        explain::the_examples_for_kubernetes_are_granted,
        state::what_is_left_behind_is_listed_and_removed,
        state::failures_of_the_hook_are_listed,
        state::a_user_is_shown_his_own,
        drain::every_proxy_of_the_device_is_told,
        drain::a_proxy_that_does_not_is_named,
        drain::what_keeps_no_driver_is_not_drained,
        stats::forged_and_short_counters_are_a_line_each,
        stats::counters_of_one_container_are_chosen_by_its_id,
        stats::who_watches_may_stop,
    ])
}

fn help_of_every_subcommand_shows_examples() {
    let node = Node::new("");
    let help = node.succeed(&["--help"]);
    for (subcommand, example) in [
        ("explain", "ringfence explain --policy gold"),
        ("cdi", "ringfence cdi generate"),
        ("list", "ringfence list --failures"),
        ("stats", "ringfence stats --json"),
        ("info", "ringfence info --json"),
        ("drain", "ringfence drain --resume mlx5_0"),
        ("gc", "ringfence gc --dry-run"),
        ("config", "ringfence config validate"),
        ("completion", "ringfence completion bash"),
    ] {
        assert!(help.contains(subcommand), "{subcommand}");
        assert!(node.succeed(&[subcommand, "--help"]).contains(example), "{subcommand}");
    }
}

fn the_version_names_the_commit() {
    let node = Node::new("");
    let shown = json(&node.succeed(&["version", "--json"]));
    assert_eq!(shown["version"], env!("CARGO_PKG_VERSION"));
    let line = node.succeed(&["version"]);
    assert!(line.contains(shown["commit"].as_str().unwrap()), "{line}");
}

fn completions_and_pages_know_every_subcommand() {
    let node = Node::new("");
    let pages = node.path("man");
    std::fs::create_dir(&pages).unwrap();
    node.succeed(&["man", pages.to_str().unwrap()]);
    let subcommands = [
        "configure",
        "unconfigure",
        "doctor",
        "explain",
        "list",
        "stats",
        "info",
        "drain",
        "gc",
        "cdi",
        "config",
        "version",
        "completion",
    ];
    for shell in ["bash", "zsh", "fish"] {
        let script = node.succeed(&["completion", shell]);
        for subcommand in subcommands {
            assert!(script.contains(subcommand), "{shell} {subcommand}");
        }
    }
    for subcommand in subcommands {
        assert!(pages.join(format!("ringfence-{subcommand}.1")).exists(), "{subcommand}");
    }
    for page in
        ["ringfence.1", "ringfence-hook.8", "ringfence.toml.5", "ringfence-annotations.7", "ringfence-counters.7"]
    {
        assert!(std::fs::read_to_string(pages.join(page)).unwrap().contains(".SH"), "{page}");
    }
}

fn who_reads_the_output_may_stop() {
    let node = Node::new("");
    let mut child =
        node.command(&["completion", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

fn who_reads_the_errors_may_have_stopped() {
    let node = Node::new("nonsense");
    let mut child = node.command(&["list"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
