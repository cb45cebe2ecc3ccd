//! `report.html`: one file with all in it, for a phone, for print, for light and for dark.
//!
//! Words stand in HTML, where they wrap and keep their size; only bars are SVG, which stretches. Every text is escaped: names and
//! faults are what other programs said.

use std::fmt::Write as _;

use crate::measure::{self, Better, Group};
use crate::phases::Phases;
use crate::result::{Figure, Report};
use crate::table::{NOT_MEASURED, explanation, number, verdict};

const STYLE: &str = include_str!("report.css");
const METHODS: &str = include_str!("../methods.md");
/// The width of all drawings, in their own units.
const WIDTH: f64 = 1000.0;

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>vmm bench</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>vmm bench</h1>\n"
    );
    let mut add = |part: String| page.push_str(&part);
    let warning = report.host.virtualization.warning().map(str::to_owned);
    let partial = report.partial.as_ref().map(|why| format!("A PART ONLY: {why}"));
    warning.into_iter().chain(partial).for_each(|words| add(format!("<p class=\"warning\">{}</p>\n", escaped(&words))));
    add(facts(report));
    add(format!("<p>{}</p>\n", escaped(&explanation())));
    let groups = Group::FULL.iter().filter(|group| has(report, **group));
    groups.for_each(|group| add(section(report, *group)));
    add(troubles(report));
    add(format!("<section id=\"methods\">\n{}</section>\n</main>\n</body>\n</html>\n", markdown(METHODS)));
    page
}

fn has(report: &Report, group: Group) -> bool {
    measure::ALL
        .iter()
        .any(|measure| measure.group == group && report.figures.iter().any(|figure| figure.measure == measure.name))
}

/// What was measured, where.
fn facts(report: &Report) -> String {
    let mut facts: Vec<(&str, String)> = report.host.lines();
    facts.push(("noise", report.noise.map_or("not known".to_owned(), |noise| format!("{:.1}%", noise * 100.0))));
    facts.push(("suite", format!("{}, {} rounds, seed {}", report.suite, report.rounds, report.seed)));
    let rows = facts.iter().map(|(name, value)| format!("<dt>{}</dt><dd>{}</dd>\n", escaped(name), escaped(value)));
    let legend = report.contenders.iter().enumerate().map(|(at, contender)| {
        let (name, version) = (escaped(&contender.name), escaped(&contender.version));
        format!("<li><span class=\"key c{}\"></span>{name} <small>{version}</small></li>\n", at % COLOURS)
    });
    format!("<dl>\n{}</dl>\n<ul class=\"legend\">\n{}</ul>\n", rows.collect::<String>(), legend.collect::<String>())
}

/// How many colours the style sheet has.
const COLOURS: usize = 6;

fn section(report: &Report, group: Group) -> String {
    let mut text = format!("<section>\n<h2>{}</h2>\n", escaped(group.title()));
    for measure in measure::ALL.iter().filter(|measure| measure.group == group) {
        let figures: Vec<&Figure> = report.figures.iter().filter(|figure| figure.measure == measure.name).collect();
        if figures.is_empty() {
            continue;
        }
        let better = if measure.better == Better::Lower { "less is better" } else { "more is better" };
        writeln!(
            text,
            "<figure>\n<figcaption>{} <small>{}, {}; {better}</small></figcaption>",
            escaped(measure.title),
            escaped(measure.name),
            escaped(measure.unit)
        )
        .expect("a string takes every write");
        let most =
            figures.iter().flat_map(|figure| figure.samples.iter().map(|sample| sample.value)).fold(0.0, f64::max);
        figures.iter().for_each(|figure| text.push_str(&row(report, figure, most)));
        text.push_str("</figure>\n");
    }
    if group == Group::Start && !report.phases.is_empty() {
        text.push_str(&phases(&report.phases));
    }
    text + "</section>\n"
}

/// One contender's bar, its interval and its rounds.
fn row(report: &Report, figure: &Figure, most: f64) -> String {
    let Some(estimate) = figure.estimate.filter(|_| most > 0.0) else { return String::new() };
    let colour =
        report.contenders.iter().position(|contender| contender.name == figure.contender).unwrap_or(0) % COLOURS;
    let at = |value: f64| format!("{:.1}", (value / most * WIDTH).clamp(0.0, WIDTH));
    let rounds = figure.samples.iter().map(|sample| {
        let x = at(sample.value);
        format!("<line class=\"round\" x1=\"{x}\" x2=\"{x}\" y1=\"3\" y2=\"21\"/>")
    });
    let label = format!("{} {} {}", figure.contender, number(estimate.median), figure.unit);
    format!(
        "<div class=\"row\"><span class=\"name\">{name}</span>\
         <svg class=\"c{colour}\" viewBox=\"0 0 {WIDTH} 24\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{label}\">\
         <rect class=\"bar\" x=\"0\" y=\"4\" width=\"{median}\" height=\"16\"/>{rounds}\
         <line class=\"interval\" x1=\"{low}\" x2=\"{high}\" y1=\"12\" y2=\"12\"/></svg>\
         <span class=\"value\"><b>{value}</b> <small>{from} to {to}</small></span>\
         <span class=\"verdict\">{verdict}</span></div>\n",
        name = escaped(&figure.contender),
        label = escaped(&label),
        median = at(estimate.median),
        rounds = rounds.collect::<String>(),
        low = at(estimate.low),
        high = at(estimate.high),
        value = number(estimate.median),
        from = number(estimate.low),
        to = number(estimate.high),
        verdict = escaped(&verdict(figure)),
    )
}

/// The starts, split.
fn phases(all: &[Phases]) -> String {
    let most = all.iter().map(Phases::sum).fold(f64::MIN_POSITIVE, f64::max);
    let mut text = "<figure>\n<figcaption>Phases of a typical start <small>ms</small></figcaption>\n".to_owned();
    for one in all {
        let first = if one.opaque { "until user space" } else { "process" };
        let parts =
            [(first, Some(one.process)), ("KVM", one.kvm), ("kernel", one.kernel), ("user space", Some(one.user))];
        let mut from = 0.0;
        let (mut bars, mut words) = (String::new(), Vec::new());
        for (at, (name, time)) in parts.into_iter().enumerate() {
            let Some(time) = time else { continue };
            let (x, width) = (from / most * WIDTH, time / most * WIDTH);
            write!(bars, "<rect class=\"p{at}\" x=\"{x:.1}\" y=\"4\" width=\"{width:.1}\" height=\"16\"/>")
                .expect("a string takes every write");
            words.push(format!("<span class=\"part\"><span class=\"key p{at}\"></span>{name} {}</span>", number(time)));
            from += time;
        }
        let name = escaped(&one.contender);
        writeln!(
            text,
            "<div class=\"row\"><span class=\"name\">{name}</span>\
             <svg viewBox=\"0 0 {WIDTH} 24\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"phases of {name}\">{bars}</svg>\
             <span class=\"value\"><b>{}</b> <small>of {}</small></span><span class=\"verdict\">{}</span></div>",
            number(one.sum()),
            number(one.whole),
            words.join(" ")
        )
        .expect("a string takes every write");
    }
    text + "</figure>\n"
}

/// What is not there, and what went wrong.
fn troubles(report: &Report) -> String {
    let skipped = report.skipped.iter().map(|skipped| format!("{}: {}", skipped.what, skipped.why));
    let faults = report.faults.iter().map(|fault| format!("{}, {}: {}", fault.contender, fault.when, fault.what));
    let list = |title: &str, lines: Vec<String>| match lines.is_empty() {
        true => String::new(),
        false => {
            let items: String = lines.iter().map(|line| format!("<li>{}</li>\n", escaped(line))).collect();
            format!("<section>\n<h2>{title}</h2>\n<ul>\n{items}</ul>\n</section>\n")
        }
    };
    list("Faults", faults.collect())
        + &list("Skipped", skipped.chain([NOT_MEASURED.to_owned()]).collect())
        + &list("Weaknesses of the processor, and what the kernel does", report.host.mitigations.clone())
}

/// As much of Markdown as the methods are written in: headings, paragraphs, lists, `code`, **strong** and *stressed* words.
fn markdown(text: &str) -> String {
    let mut html = String::new();
    for block in text.split("\n\n").map(str::trim).filter(|block| !block.is_empty()) {
        let one_line = |block: &str| inline(&block.split_whitespace().collect::<Vec<_>>().join(" "));
        if let Some(title) = block.strip_prefix("## ") {
            html.push_str(&format!("<h3>{}</h3>\n", inline(title)));
        } else if let Some(title) = block.strip_prefix("# ") {
            html.push_str(&format!("<h2>{}</h2>\n", inline(title)));
        } else if let Some(items) = block.strip_prefix("- ") {
            let items: String = items.split("\n- ").map(|item| format!("<li>{}</li>\n", one_line(item))).collect();
            html.push_str(&format!("<ul>\n{items}</ul>\n"));
        } else {
            html.push_str(&format!("<p>{}</p>\n", one_line(block)));
        }
    }
    html
}

fn inline(text: &str) -> String {
    [("`", "code"), ("**", "strong"), ("*", "em")].iter().fold(escaped(text), |text, (mark, tag)| {
        let parts = text.split(mark).enumerate();
        let parts =
            parts.map(|(at, part)| if at % 2 == 1 { format!("<{tag}>{part}</{tag}>") } else { part.to_owned() });
        parts.collect()
    })
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::report;

    #[test]
    fn what_programs_said_is_text_and_never_markup() {
        let mut report = report();
        report.contenders[1].version = "\"><script>alert(1)</script>".to_owned();
        let page = page(&report);
        assert!(!page.contains("<b>hung</b>") && page.contains("&lt;b&gt;hung&lt;/b&gt;"));
        assert!(!page.contains("<script"));
    }

    #[test]
    fn the_page_needs_no_other_file() {
        let page = page(&report());
        for word in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(page.contains("prefers-color-scheme") && page.contains("@media print"));
    }

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let page = page(&report());
        // The greatest sample is 20.2 ms, the medians are 10.05 and 20.1.
        assert!(page.contains("width=\"497.5\"") && page.contains("width=\"995.0\""), "{page}");
    }

    #[test]
    fn the_methods_are_in_the_page() {
        assert_eq!(
            markdown("## A `b`\n\ntext\nmore\n\n- one *x*\n- **two**\n  lines\n"),
            "<h3>A <code>b</code></h3>\n<p>text more</p>\n<ul>\n<li>one <em>x</em></li>\n<li><strong>two</strong> lines</li>\n</ul>\n"
        );
        let page = page(&report());
        for group in Group::FULL.iter().filter(|group| **group != Group::Memory) {
            assert!(page.contains(&format!("<h3>{}</h3>", group.title())), "{}", group.title());
        }
    }
}
