//! Machines for people: columns as wide as what is in them.

use crate::control::Status;

const HEAD: [&str; 4] = ["NAME", "ADDRESS", "RESTARTS", "STATE"];

/// The table, with its head.
pub(crate) fn of(machines: &[Status]) -> String {
    let row = |status: &Status| {
        [status.name.clone(), status.address.clone(), status.restarts.to_string(), status.state.clone()]
    };
    let rows: Vec<[String; 4]> = std::iter::once(HEAD.map(str::to_owned)).chain(machines.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let line = |row: &[String; 4]| {
        let cells: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        format!("{cells}{}\n", row[3])
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let status = Status {
            name: "shop-web-1".into(),
            service: "web".into(),
            address: "10.89.1.2".into(),
            state: "healthy".into(),
            restarts: 0,
        };
        let text = "NAME        ADDRESS    RESTARTS  STATE\nshop-web-1  10.89.1.2  0         healthy\n";
        assert_eq!(of(&[status]), text);
    }
}
