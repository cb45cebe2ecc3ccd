//! The known name nearest to a mistyped one: edit distance in which a swap of neighbours counts once.

/// Longer words are no names, and the cost grows with the square.
const LONGEST: usize = 64;

/// The candidate that `word` was most likely meant to be, if one is near enough to be worth saying: one edit in three
/// letters, or one of the two begins with the other (`memory`, `mem`).
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.trim().to_lowercase();
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    candidates
        .into_iter()
        .filter(|candidate| !candidate.is_empty() && candidate.len() <= LONGEST)
        .filter_map(|candidate| {
            let lower = candidate.to_lowercase();
            let edits = distance(&word, &lower);
            let shorter = word.len().min(lower.len());
            let begins = shorter > 1 && (lower.starts_with(&word) || word.starts_with(&lower));
            let allowed = (word.len().max(lower.len()) / 3).max(1);
            let near = begins || (edits <= allowed && edits < shorter);
            near.then_some((edits, candidate))
        })
        .min_by_key(|&(edits, _)| edits)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    let mut last = None;
    for (row, letter) in a.chars().enumerate() {
        let mut current = vec![row + 1];
        for (column, &other) in b.iter().enumerate() {
            let replaced = above[column] + usize::from(letter != other);
            let mut edits = replaced.min(above[column + 1] + 1).min(current[column] + 1);
            let swapped = column > 0 && last == Some(other) && b[column - 1] == letter;
            if swapped {
                edits = edits.min(before[column - 1] + 1);
            }
            current.push(edits);
        }
        before = std::mem::replace(&mut above, current);
        last = Some(letter);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 5] = ["mem", "path", "ro", "hugepages", "prefault"];

    #[test]
    fn a_mistyped_name_finds_the_one_that_was_meant() {
        assert_eq!(nearest("huegpages", KEYS), Some("hugepages"));
        assert_eq!(nearest("hugepage", KEYS), Some("hugepages"));
        assert_eq!(nearest("pth", KEYS), Some("path"));
        assert_eq!(nearest("memory", KEYS), Some("mem"));
        assert_eq!(nearest("Path ", KEYS), Some("path"));
        assert_eq!(nearest("or", KEYS), Some("ro"));
    }

    #[test]
    fn a_name_unlike_all_others_finds_none() {
        assert_eq!(nearest("queue", KEYS), None);
        assert_eq!(nearest("", KEYS), None);
        assert_eq!(nearest("x", KEYS), None);
        assert_eq!(nearest(&"hugepages".repeat(100), KEYS), None);
        assert_eq!(nearest("mem", []), None);
    }

    #[test]
    fn a_swap_of_neighbours_is_one_edit() {
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
    }
}
