//! The table of `bench io`: figures out of the lines that guests wrote.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::inside::Measured;
use super::io::{figure_name, loads, run_name};
use super::load::Figure;
use super::record::ratio;

/// Figures by the name of the load.
pub(super) type Figures = BTreeMap<String, Figure>;

/// The figures of one VMM.
pub(super) fn figures(measured: &BTreeMap<String, Measured>, whose: &str) -> Result<Figures> {
    let mut figures = Figures::new();
    for vhost in ["off", "on"] {
        for load in loads(vhost) {
            let name = figure_name(vhost, load);
            let Some(measured) = measured.get(&run_name(whose, vhost, load)) else { continue };
            let figure = load.figure(&measured.lines);
            if let Some(figure) = figure.with_context(|| format!("{whose}: {name}"))? {
                figures.insert(name, figure);
            }
        }
    }
    Ok(figures)
}

/// The median of each figure over the runs that gave it.
pub(super) fn medians(measured: &BTreeMap<String, Measured>, whose: &str) -> Result<Figures> {
    let mut all: BTreeMap<String, Vec<Figure>> = BTreeMap::new();
    for (vhost, load) in ["off", "on"].into_iter().flat_map(|vhost| loads(vhost).map(move |load| (vhost, load))) {
        let run = run_name(whose, vhost, load);
        for (_, measured) in
            measured.iter().filter(|(name, _)| name.split_once(' ').is_some_and(|(_, name)| name == run))
        {
            all.entry(figure_name(vhost, load)).or_default().extend(load.figure(&measured.lines)?);
        }
    }
    let middle = |mut figures: Vec<Figure>| {
        figures.sort_unstable_by_key(|figure| figure.nanoseconds);
        figures.get(figures.len() / 2).copied()
    };
    Ok(all.into_iter().filter_map(|(name, figures)| Some((name, middle(figures)?))).collect())
}

/// Prints the figures of ours, of QEMU as it comes, and of QEMU at its best.
pub(super) fn print([ours, mmio, pci]: &[Figures; 3]) {
    println!("{:42} {:>10} {:>17} {:>18} {:>16}", "", "ours", "QEMU (ours is)", "QEMU PCI (ours is)", "exits a piece");
    for vhost in ["off", "on"] {
        for load in loads(vhost) {
            let name = figure_name(vhost, load);
            let own = ours.get(&name);
            let [mmio_cell, pci_cell] = [mmio, pci].map(|peer| match (own, peer.get(&name)) {
                (Some(own), Some(peer)) => {
                    format!("{} ({:.2})", load.shown(peer), ratio(peer.nanoseconds, own.nanoseconds))
                }
                (None, Some(peer)) => load.shown(peer),
                (_, None) => "-".to_owned(),
            });
            let exits = [ours, mmio, pci].map(|figures| exits(figures.get(&name))).join(" / ");
            let own = own.map_or("-".to_owned(), |figure| load.shown(figure));
            println!("{name:42} {own:>10} {mmio_cell:>17} {pci_cell:>18} {exits:>16}");
        }
    }
}

fn exits(figure: Option<&Figure>) -> String {
    figure.map_or("-".to_owned(), |figure| format!("{:.1}", ratio(figure.exits, 1000)))
}
