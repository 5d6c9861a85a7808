//! `ringfence man`

use crate::commands::Cli;
use crate::commands::config::EXAMPLE;
use crate::commands::version::VERSION;
use anyhow::{Context, Result};
use clap::CommandFactory;
use std::path::PathBuf;
use std::process::ExitCode;

/// Pages of what has no command line of clap's.
const PAGES: [(&str, &str); 7] = [
    ("ringfence-hook.8", include_str!("../../man/ringfence-hook.8")),
    ("ringfence-runtime.8", include_str!("../../man/ringfence-runtime.8")),
    ("containerd-shim-ringfence-v2.8", include_str!("../../man/containerd-shim-ringfence-v2.8")),
    ("ringfence-proxy.8", include_str!("../../man/ringfence-proxy.8")),
    ("ringfence.toml.5", include_str!("../../man/ringfence.toml.5")),
    ("ringfence-counters.7", include_str!("../../man/ringfence-counters.7")),
    ("ringfence-annotations.7", include_str!("../../man/ringfence-annotations.7")),
];

/// Writes the man pages
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An existing directory
    directory: PathBuf,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let directory = &self.directory;
        clap_mangen::generate_to(Cli::command(), directory).with_context(|| directory.display().to_string())?;
        for (name, page) in PAGES {
            let path = directory.join(name);
            std::fs::write(&path, fill(page)).with_context(|| path.display().to_string())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn fill(page: &str) -> String {
    page.replace("@VERSION@", VERSION).replace("@EXAMPLE@", verbatim(EXAMPLE).trim_end())
}

/// `text` as roff shows it unchanged.
fn verbatim(text: &str) -> String {
    let line = |line: &str| {
        let line = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
        // Such a line would be a request.
        if line.starts_with('.') { format!("\\&{line}\n") } else { format!("{line}\n") }
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_hook::Code;

    fn page(name: &str) -> String {
        fill(PAGES.iter().find(|(found, _)| *found == name).unwrap().1)
    }

    #[test]
    fn nothing_is_left_to_fill_in() {
        for (name, text) in PAGES {
            assert!(!fill(text).contains('@'), "{name}");
        }
    }

    #[test]
    fn every_line_of_the_example_is_shown() {
        let shown = page("ringfence.toml.5").replace("\\-", "-").replace("\\(aq", "'");
        assert!(shown.contains(EXAMPLE.trim_end()));
    }

    #[test]
    fn every_annotation_is_explained() {
        let page = page("ringfence-annotations.7").replace("\\-", "-");
        let (_, list) = page.split_once(".SH KEYS").unwrap();
        for key in ringfence_hook::annotations::KEYS {
            let explains = |line: &str| line.starts_with(".B") && line.split_whitespace().any(|word| word == key);
            assert!(list.lines().any(explains), "{key}");
        }
    }

    #[test]
    fn what_requests_count_and_what_classes_do_is_as_the_scheduler_has_it() {
        use ringfence_sched::scheduler::{URGENT, charged};
        use ringfence_sched::{Bytes, HEADERS, Weight, window};
        let page = page("ringfence-annotations.7").replace("\\-", "-").split_whitespace().collect::<Vec<_>>().join(" ");
        let least = charged(Bytes(0)).0;
        for words in [
            format!("A request of less than {least} bytes counts as {least}, one of none and an atomic among them."),
            format!("one of less than {least} bytes counts as {least} here too."),
            format!("{} bytes for each request and each piece", HEADERS.0),
            format!("; {} where none is given", Weight::default().get()),
            format!("requests of at most {} KiB are urgent.", URGENT.0 >> 10),
            format!(
                "to {} microseconds of it for each {} of weight, instead of {}",
                window::ABOUT.0 / 1000,
                Weight::default().get(),
                window::CALM.0 / 1000
            ),
        ] {
            assert!(page.contains(&words), "{words}");
        }
    }

    #[test]
    fn every_counter_is_explained() {
        use ringfence_launch::counters::{BYTES, MAGIC, OPCODES, Page, QUOTAS, VERSION};
        let mut bytes = vec![0; BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&VERSION.to_le_bytes());
        let json = serde_json::to_value(Page::read(&bytes).unwrap()).unwrap();
        let page = page("ringfence-counters.7").replace("\\-", "-");
        let names = json.as_object().unwrap().keys().map(String::as_str);
        for name in names.chain(OPCODES).chain(QUOTAS) {
            assert!(page.split_whitespace().any(|word| word.trim_end_matches([',', '.']) == name), "{name}");
        }
    }

    #[test]
    fn every_exit_code_is_explained() {
        let page = page("ringfence-hook.8");
        for code in [
            Code::Internal,
            Code::Usage,
            Code::State,
            Code::Config,
            Code::Annotation,
            Code::Denied,
            Code::Device,
            Code::Injection,
            Code::NotReady,
            Code::ProxyDied,
            Code::Privilege,
        ] {
            assert!(page.contains(&format!(".TP\n.B {}\n", code as u8)), "{code:?}");
        }
    }
}
