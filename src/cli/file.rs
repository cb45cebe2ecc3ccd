//! A machine's description in a TOML file. Paths in it count from the folder that it is in.

use std::path::Path;

use clap::{Arg, Args, Command};
use machine::VmConfig;

use crate::exit::Usage;

/// A description larger than that is a mistake.
const LARGEST: u64 = 1 << 20;

/// Reads the file at `path`.
pub(crate) fn read(path: &Path) -> Result<VmConfig, Usage> {
    let wrong = |reason: String| Usage(format!("the configuration {} {reason}", path.display()));
    let unreadable = |error| wrong(format!("cannot be read ({error}): give --config a TOML file"));
    if std::fs::metadata(path).map_err(unreadable)?.len() > LARGEST {
        return Err(wrong("is larger than 1M: give --config a TOML file".into()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let mut config = parse(&text).map_err(wrong)?;
    config.resolve(path.parent().unwrap_or(Path::new("")));
    Ok(config)
}

/// Reads the text of a file. What is wrong is said with its line and, for a name, the nearest known one.
fn parse(text: &str) -> Result<VmConfig, String> {
    toml::from_str(text).map_err(|error| {
        let message = error.message().trim().replace('\n', ", ");
        let line = match error.span() {
            Some(span) if span.start > 0 => 1 + text[..span.start.min(text.len())].matches('\n').count(),
            // The whole file, or nothing.
            _ => line_of_name(text, &message),
        };
        let hint = nearest_of(&message).map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
        format!("is wrong in line {line}: {message}{hint}")
    })
}

/// The line with the name that a message quotes, for those that serde gives no place.
fn line_of_name(text: &str, message: &str) -> usize {
    let names = |name: &str| {
        text.lines().position(|line| {
            let rest = line.trim_start_matches(['[', ' ', '\t']).strip_prefix(name);
            rest.is_some_and(|rest| rest.trim_start().starts_with(['=', ']', '.']))
        })
    };
    1 + message.split('`').nth(1).and_then(names).unwrap_or(0)
}

/// The known name nearest to the unknown one, from serde's words: "unknown field `x`, expected one of `a`, `b`".
/// Where it names none, those of the file itself are meant, which are the flags'.
fn nearest_of(message: &str) -> Option<String> {
    let mut names = message.strip_prefix("unknown ")?.split('`').skip(1).step_by(2).peekable();
    let unknown = names.next()?;
    if names.peek().is_some() {
        return kv::nearest(unknown, names).map(str::to_owned);
    }
    let flags = VmConfig::augment_args(Command::new(""));
    kv::nearest(unknown, flags.get_arguments().filter_map(Arg::get_long)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_names_and_keys_of_the_flags() {
        let config = parse(
            "name = 'web'\ncmdline = 'quiet'\non-reboot = 'exit'\n[kernel]\npath = 'bzImage'\n\
             [mem]\nsize = '1G'\nprefault = true\n[cpus]\ncount = 2\nfeatures = '-avx2'\n",
        )
        .unwrap();
        assert_eq!(config.name.as_deref(), Some("web"));
        assert_eq!(config.mem.unwrap().size, kv::Size(1 << 30));
        assert_eq!(config.cpus.unwrap().count, 2);
    }

    #[test]
    fn a_table_can_be_said_as_the_text_that_its_flag_takes() {
        let text = parse("kernel = 'bzImage'\nmem = '1G,prefault'\ncpus = 2\nserial = 'file,path=log'\n").unwrap();
        let tables = "[kernel]\npath = 'bzImage'\n[mem]\nsize = '1G'\nprefault = true\n[cpus]\ncount = 2\n\
                      [serial.file]\npath = 'log'\n";
        assert_eq!(text, parse(tables).unwrap());
        assert_eq!(parse("serial = 'pty'\n").unwrap(), parse("[serial.pty]\n").unwrap());
        let error = parse("name = 'x'\nmem = '12Q'\n").unwrap_err();
        assert!(error.contains("line 2") && error.contains("12Q"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_name() {
        let error = parse("name = 'x'\n\n[mem]\nsiez = '1G'\n").unwrap_err();
        assert!(
            error.contains("line 4") && error.contains("`siez`") && error.contains("did you mean `size`"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn an_unknown_table_is_named_with_its_line_and_the_nearest_known_name() {
        let error = parse("name = 'x'\n\nmemm = '1G'\n").unwrap_err();
        assert!(
            error.contains("line 3") && error.contains("`memm`") && error.contains("did you mean `mem`"),
            "{error}"
        );
        let error = parse("name = 'x'\n[[dsik]]\npath = 'a.img'\n").unwrap_err();
        assert!(error.contains("line 2") && error.contains("did you mean `disk`"), "{error}");
        let error = parse("name = 'x'\n[[disk]]\npath = 'a.img'\nserail = 'a'\n").unwrap_err();
        assert!(error.contains("line 4") && error.contains("did you mean `serial`"), "{error}");
    }

    #[test]
    fn devices_are_lists_of_texts_or_tables() {
        let tables = parse("[[disk]]\npath = 'a.img'\nreadonly = true\n[[disk]]\npath = 'b.img'\n").unwrap();
        assert_eq!(tables, parse("disk = ['a.img,readonly', 'b.img']\n").unwrap());
        assert_eq!(parse("disk = 'a.img'\n").unwrap(), parse("[disk]\npath = 'a.img'\n").unwrap());
    }

    #[test]
    fn paths_count_from_the_file_s_folder() {
        let mut config = parse("kernel = 'k'\ninitrd = '/i'\nserial = 'pty,link=tty'\ndisk = 'd'\n").unwrap();
        config.resolve(Path::new("/vm"));
        assert_eq!(config.serial, parse("serial = 'pty,link=/vm/tty'\n").unwrap().serial);
        let paths = [config.kernel.unwrap().path, config.initrd.unwrap(), config.devices.disk[0].path.clone()];
        assert_eq!(paths.map(|path| path.display().to_string()), ["/vm/k", "/i", "/vm/d"]);
    }

    #[test]
    fn text_that_is_not_toml_is_refused_with_its_line() {
        let error = parse("name = 'x'\nkernel bzImage\n").unwrap_err();
        assert!(error.contains("line 2") && !error.contains('\n'), "{error}");
    }
}
