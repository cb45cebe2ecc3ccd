//! README's table of figures: it has those on record, so that README never claims what was not measured.

use super::Finding;
use super::source::Source;
use crate::bench;

pub(super) fn check(source: &Source) -> Vec<Finding> {
    if source.name != "README.md" {
        return Vec::new();
    }
    let cure = "`cargo xtask bench readme` writes them";
    match bench::with_figures(&source.text) {
        Ok(text) if text == source.text => Vec::new(),
        Ok(text) => {
            let same = text.lines().zip(source.text.lines()).take_while(|(new, old)| new == old).count();
            vec![source.finding(same + 1, "these figures are not those on record", cure)]
        }
        Err(error) => vec![source.finding(1, format!("{error:#}"), cure)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_is_not_on_record_is_found_with_its_line() {
        let begin = "# vmm\n<!-- figures, written by `cargo xtask bench` -->\n";
        let text = format!("{begin}| fast | 1 s |\n<!-- end of the figures -->\n");
        let found = check(&Source::new("README.md", text.clone()));
        assert_eq!(found.iter().map(|finding| finding.line).collect::<Vec<_>>(), [3]);
        assert_eq!(check(&Source::new("README.md", bench::with_figures(&text).unwrap())), []);
        assert_eq!(check(&Source::new("other.md", text)), []);
    }
}
