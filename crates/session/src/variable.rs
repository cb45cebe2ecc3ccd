//! Variables of a command's environment, as they are asked for.

use std::env;
use std::str::FromStr;

/// A variable of an environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable(String, String);

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("", _)) => Err("a variable has a name: say NAME=VALUE".into()),
            Some((name, value)) => Ok(Self(name.into(), value.into())),
            None => env::var(text)
                .map(|value| Self(text.into(), value))
                .map_err(|_| format!("{text} has no value here that is text: say {text}=VALUE")),
        }
    }
}

/// A command's environment: each variable has the value that was said last, and those in `base` were said before the others.
/// At a terminal a command knows which kind that is.
pub fn environment(
    base: impl IntoIterator<Item = (String, String)>,
    variables: &[Variable],
    terminal: bool,
) -> Vec<(String, String)> {
    let term = env::var("TERM").ok().filter(|_| terminal);
    let mut all: Vec<_> = term.map(|term| ("TERM".to_owned(), term)).into_iter().collect();
    let own = variables.iter().map(|Variable(name, value)| (name.clone(), value.clone()));
    for (name, value) in base.into_iter().chain(own) {
        all.retain(|(other, _)| *other != name);
        all.push((name, value));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_last_of_a_variable_is_its_value() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let variables = [Variable("A".into(), "2".into()), Variable("A".into(), "3".into())];
        let all = environment([pair("A", "1"), pair("B", "1")], &variables, false);
        assert_eq!(all, [pair("B", "1"), pair("A", "3")]);
    }

    #[test]
    fn a_variable_without_a_value_has_the_one_that_it_has_here() {
        assert_eq!("A=b=c".parse(), Ok(Variable("A".into(), "b=c".into())));
        assert_eq!("PATH".parse(), Ok(Variable("PATH".into(), env::var("PATH").unwrap())));
        assert!("=b".parse::<Variable>().is_err() && "NO_SUCH_VARIABLE".parse::<Variable>().is_err());
    }
}
