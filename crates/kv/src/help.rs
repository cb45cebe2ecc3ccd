//! Help for a flag's value, from the doc comments of the type that it is read as.
//!
//! A type derives `clap::Args` (or, for a choice, `clap::Subcommand`) for its doc comments alone:
//! no flag or command is made of it, so help stands where the field does, once.

use std::fmt::Write;

use clap::{Arg, Args, Command, Subcommand};

/// One line for each key of a struct: `  size  Bytes of RAM, …`.
pub fn keys<T: Args>() -> String {
    columns(T::augment_args(Command::new("")).get_arguments(), "")
}

/// One line for each variant of a choice, and below it one for each of its keys.
pub fn variants<T: Subcommand>() -> String {
    let choices = T::augment_subcommands(Command::new(""));
    choices.get_subcommands().fold(String::new(), |mut text, choice| {
        let about = choice.get_about().map(ToString::to_string).unwrap_or_default();
        writeln!(text, "  {:<14} {about}", choice.get_name()).expect("a string takes every write");
        text + &columns(choice.get_arguments(), "  ")
    })
}

fn columns<'a>(arguments: impl Iterator<Item = &'a Arg>, indent: &str) -> String {
    arguments.fold(String::new(), |mut text, argument| {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        writeln!(text, "{indent}  {:<14} {help}", argument.get_id().as_str().replace('_', "-"))
            .expect("a string takes every write");
        text
    })
}

/// What is wrong with a command line, as one line: the first sentence and the tips, without the usage.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let more = lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let whole = more.fold(first.to_owned(), |whole, line| {
        let between = if whole.ends_with(':') { " " } else { "; " };
        whole + between + line
    });
    format!("{whole}; see vmm --help")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Args)]
    struct File {
        /// Where it is
        #[allow(dead_code, reason = "only its help is used")]
        path: String,
        /// Whether it stays
        #[allow(dead_code, reason = "only its help is used")]
        read_only: bool,
    }

    #[derive(Subcommand)]
    enum Choice {
        /// Nowhere
        Off,
        /// Into a file
        File(File),
    }

    #[test]
    fn every_key_stands_with_its_doc_comment() {
        assert_eq!(keys::<File>(), "  path           Where it is\n  read-only      Whether it stays\n");
    }

    #[test]
    fn every_variant_stands_with_its_keys_below() {
        let help = variants::<Choice>();
        assert_eq!(
            help,
            "  off            Nowhere\n  file           Into a file\n    path           Where it is\n    read-only      Whether it stays\n"
        );
        // Constructed here so that the variants are not dead code.
        assert!(matches!([Choice::Off, Choice::File(File { path: String::new(), read_only: true })][0], Choice::Off));
    }
}
