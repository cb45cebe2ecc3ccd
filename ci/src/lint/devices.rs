//! Outside `crates/devices` nothing names a device, so that adding one touches no other crate.
//!
//! The check is on the words of identifiers in code: `rtc_base` and `SerialPort` name a device. Comments and strings
//! may: a default command line speaks of the guest's consoles, and a comment of why a register is there. The command
//! line and `ci` are free to: users say what they want by name, and tests too.

use super::Finding;
use super::source::{Source, identifiers};

/// The crates that must not know any device.
const CRATES: [&str; 7] = ["kv", "memory", "kvm", "boot", "bus", "virtio", "machine"];

/// Words that name a device and nothing else. Ambiguous ones (`mem`, `fs`, `console`, `input`, `block`) are not here.
const DEVICES: [&str; 14] = [
    "balloon", "blk", "cmos", "i8042", "keyboard", "net", "pmem", "pvpanic", "rng", "rtc", "serial", "uart", "vmgenid",
    "vsock",
];

/// Stands for every word.
const ANY: &str = "";

/// Files that may use one of the words, and why.
const EXCEPTIONS: [(&str, &str, &str); 6] = [
    ("crates/boot/src/acpi.rs", "cmos", "a flag of the FADT says that there is none"),
    ("crates/boot/src/acpi.rs", "rtc", "a flag of the FADT says that there is none"),
    ("crates/boot/src/load.rs", "rng", "the boot protocol names its seed so"),
    ("crates/machine/src/config.rs", "serial", "every machine has the one serial console"),
    ("crates/virtio/src/device.rs", ANY, "the specification numbers the kinds of devices"),
    ("crates/virtio/src/transport/pci.rs", ANY, "PCI has a class code for each kind"),
];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut parts = source.name.split('/');
    let ours = parts.next() == Some("crates") && parts.next().is_some_and(|name| CRATES.contains(&name));
    if !ours {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (number, line) in source.production() {
        for identifier in identifiers(line) {
            if identifier == "net" && line.contains("::net") {
                continue; // The standard library's sockets.
            }
            let named = words(identifier).into_iter().find(|word| DEVICES.contains(&word.as_str()));
            if let Some(word) = named.filter(|word| !is_exception(&source.name, word)) {
                let what = format!("{identifier} names a device ({word})");
                let cure = "let the device hand it over as data, or say why not in EXCEPTIONS, ci/src/lint/devices.rs";
                findings.push(source.finding(number, what, cure));
            }
        }
    }
    findings
}

fn is_exception(file: &str, word: &str) -> bool {
    EXCEPTIONS.iter().any(|(exception, allowed, _)| *exception == file && [word, ANY].contains(allowed))
}

/// The words of `snake_case`, `CamelCase` and `UPPER_CASE`, in lower case.
fn words(identifier: &str) -> Vec<String> {
    let mut words = Vec::new();
    for part in identifier.split('_') {
        let mut word = String::new();
        let mut was_lower = false;
        for c in part.chars() {
            if c.is_uppercase() && was_lower {
                words.push(std::mem::take(&mut word));
            }
            was_lower = c.is_lowercase();
            word.extend(c.to_lowercase());
        }
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, text: &str) -> Vec<String> {
        check(&Source::new(file, text.to_owned())).into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn identifiers_fall_into_their_words() {
        assert_eq!(words("SerialPort"), ["serial", "port"]);
        assert_eq!(words("RTC_BASE"), ["rtc", "base"]);
        assert_eq!(words("internet_of"), ["internet", "of"]);
    }

    #[test]
    fn a_device_named_outside_its_crate_is_found() {
        assert_eq!(
            found("crates/machine/src/a.rs", "let x = SerialSpec::new();\n"),
            ["SerialSpec names a device (serial)"]
        );
        assert_eq!(found("crates/boot/src/acpi.rs", "const HAS_I8042: u16 = 2;\n").len(), 1);
    }

    #[test]
    fn comments_strings_tests_and_the_device_crate_may_name_them() {
        let text = "// serial\nlet a = \"uart\"; let serialize = network(std::net);\n".replace("std::net", "b");
        assert_eq!(found("crates/machine/src/a.rs", &text), Vec::<String>::new());
        assert_eq!(found("crates/machine/src/tests.rs", "let serial = 1;\n"), Vec::<String>::new());
        assert_eq!(found("crates/devices/src/lib.rs", "let serial = 1;\n"), Vec::<String>::new());
        assert_eq!(found("src/main.rs", "let serial = 1;\n"), Vec::<String>::new());
    }
}
