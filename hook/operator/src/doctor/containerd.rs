//! containerd's registration.

use super::Report;
use super::registrations::version;
use crate::engines::containerd::files::Place;
use crate::engines::containerd::{NAME, defects, misuses_shim};
use crate::engines::host::Host;
use ringfence_hook::config::Config;

const CONFIGURE: &str = "ringfence configure --engine containerd";
const SUBJECT: &str = "containerd";

/// Checks it.
pub fn check(report: &mut Report, host: &Host, config: &Config) {
    report.ok(SUBJECT, version(host, "containerd"));
    let place = match Place::find(host, None) {
        Ok(place) => place,
        Err(error) => return report.fail(SUBJECT, format!("{error:#}"), "correct that file"),
    };
    if let Some(loaded) = place.files.iter().find(|loaded| loaded.file.disables_cri()) {
        let message = format!("{} disables CRI: for ctr and docker only", loaded.path.display());
        return report.ok(SUBJECT, message);
    }
    // The last file that has a CRI section counts.
    let Some(owner) = place.files.iter().rev().find(|loaded| loaded.file.has_cri()) else {
        return report.warn(SUBJECT, "the runtime ringfence is not registered", CONFIGURE);
    };
    let shown = owner.path.display();
    let registered = place.files.iter().rev().find(|loaded| loaded.file.runtime(NAME).is_some());
    let Some(registered) = registered else {
        if owner.file.default_runtime() == Some(NAME) {
            let message = format!("{shown}: the default runtime is {NAME}, which is not registered: no pod starts");
            return report.fail(SUBJECT, message, CONFIGURE);
        }
        return report.warn(SUBJECT, format!("the runtime {NAME} is not registered"), CONFIGURE);
    };
    if registered.path != owner.path && owner.file.version() <= 2 {
        let message = format!("{} registers {NAME}, but {shown} replaces that section", registered.path.display());
        return report.fail(SUBJECT, message, CONFIGURE);
    }
    let paths = (config.runtime.path.to_str().unwrap_or(""), config.shim.path.to_str());
    let defects = registered.file.runtime(NAME).map(|runtime| defects(runtime, paths.0, paths.1)).unwrap_or_default();
    let shown = registered.path.display();
    // Another runtime of our shim's type: with options it cannot work under any name.
    let others = place.files.iter().flat_map(|loaded| loaded.file.runtimes());
    for (name, runtime) in others.filter(|(name, _)| *name != NAME) {
        if let Some(defect) = misuses_shim(runtime) {
            report.fail(SUBJECT, format!("runtime {name}: {defect}"), format!("remove the options of runtime {name}"));
        }
    }
    for defect in &defects {
        let fix = format!("remove the runtime {NAME} from {shown}, then {CONFIGURE}");
        report.fail(SUBJECT, format!("{shown}: runtime {NAME}: {defect}"), fix);
    }
    if defects.is_empty() {
        report.ok(SUBJECT, format!("{shown} registers {NAME}"));
    }
}
