//! Puts a report where readers find it: a directory of its own for the day, and copies under names
//! that stay, which README.md refers to.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::judge::Report;
use super::page::PLOTS;
use super::plots::Plot;
use crate::tools::bench::report;

/// The plots that README.md shows, from [`BEGIN`] to [`END`].
const SHOWN: [&str; 3] = ["request", "connect", "services"];
/// The name of the page and of the JSON file.
const NAME: &str = "traffic";
const BEGIN: &str = "<!-- plots of the last published report -->\n";
const END: &str = "<!-- end of the plots -->\n";

/// Writes the report below a directory: the page, the JSON, and the plots beside the page.
///
/// # Errors
/// A file cannot be written.
pub fn write(report: &Report, plots: &[Plot], directory: &Path) -> Result<()> {
    let beside = directory.join(PLOTS);
    if beside.exists() {
        // Plots of an earlier run.
        fs::remove_dir_all(&beside)
            .with_context(|| format!("cannot remove {}", beside.display()))?;
    }
    fs::create_dir_all(&beside).with_context(|| format!("cannot make {}", beside.display()))?;
    for plot in plots {
        write_file(&beside.join(format!("{}.svg", plot.name)), &plot.svg)?;
    }
    let page = directory.join(NAME).with_extension("md");
    write_file(&page, &report.markdown(plots))?;
    report::write(report, &page.with_extension("json"))
}

/// Writes the report into `place/day` of the repository at `root`, copies the plots of README.md
/// into `place`, and refers to them there.
///
/// # Errors
/// The run is void or measured a part only; README.md has no place for plots, or a file cannot be
/// written.
pub fn publish(report: &Report, plots: &[Plot], root: &Path, place: &str, day: &str) -> Result<()> {
    check(report, plots)?;
    let readme = root.join("README.md");
    let text =
        fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let text = shown(&text, plots, place, day)?;
    let directory = root.join(place).join(day);
    write(report, plots, &directory)?;
    for plot in plots.iter().filter(|plot| SHOWN.contains(&plot.name)) {
        write_file(&root.join(place).join(format!("{}.svg", plot.name)), &plot.svg)?;
    }
    write_file(&readme, &text)
}

/// Fails if a report cannot be published.
fn check(report: &Report, plots: &[Plot]) -> Result<()> {
    ensure!(
        report.invalid.is_empty(),
        "not published: other work disturbed the run; measure again on a quiet machine"
    );
    for name in SHOWN {
        ensure!(
            plots.iter().any(|plot| plot.name == name),
            "not published: the run has no plot `{name}`; measure without --only"
        );
    }
    Ok(())
}

/// README.md with references to the plots.
fn shown(readme: &str, plots: &[Plot], place: &str, day: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).context("README.md has no place for plots")?;
    let (_, after) = rest.split_once(END).context("README.md does not end its plots")?;
    let mut text = format!("{before}{BEGIN}");
    for plot in SHOWN.iter().filter_map(|name| plots.iter().find(|plot| plot.name == *name)) {
        text += &format!("![{}]({place}/{}.svg)\n\n", plot.title, plot.name);
    }
    text += &format!("[The whole report]({place}/{day}/{NAME}.md)\n");
    Ok(text + END + after)
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::plots::{self, tests::report};
    use super::*;

    fn plots(report: &Report) -> Vec<Plot> {
        let mut plots = plots::all(report).expect("plots");
        let request = Plot { name: "request", ..plots[0].clone() };
        plots.push(request);
        plots
    }

    #[test]
    fn a_published_report_has_its_day_and_the_readme_shows_its_plots() {
        let root = tempfile::tempdir().expect("a directory");
        let readme = root.path().join("README.md");
        fs::write(&readme, format!("# lb\n{BEGIN}{END}rest\n")).expect("a file");
        let report = report();
        for day in ["2026-12-01", "2026-12-02"] {
            publish(&report, &plots(&report), root.path(), "docs/bench", day).expect("published");
        }
        let text = fs::read_to_string(&readme).expect("a file");
        assert!(text.starts_with("# lb\n") && text.ends_with("rest\n"), "{text}");
        for (name, count) in [("request.svg", 1), ("services.svg", 1), ("services-p99.svg", 0)] {
            assert_eq!(text.matches(&format!("(docs/bench/{name})")).count(), count, "{text}");
        }
        assert!(text.contains("(docs/bench/2026-12-02/traffic."), "{text}");
        let files = ["connect.svg", "2026-12-01/traffic.json", "2026-12-02/traffic/services.svg"];
        for file in files.map(|file| root.path().join("docs/bench").join(file)) {
            assert!(file.is_file(), "{}", file.display());
        }
    }

    #[test]
    fn a_void_or_partial_run_is_not_published() {
        let root = tempfile::tempdir().expect("a directory");
        let error = |report: &Report, plots: &[Plot]| {
            let error = publish(report, plots, root.path(), "docs", "day").expect_err("an error");
            error.to_string()
        };
        let mut report = report();
        let plots = plots(&report);
        assert!(error(&report, &plots[..1]).contains("no plot `request`"));
        report.invalid.push("a control is off".to_owned());
        assert!(error(&report, &plots).contains("quiet machine"));
    }
}
