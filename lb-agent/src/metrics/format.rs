//! The text formats of metrics: Prometheus, as kube-proxy's, or OpenMetrics for clients that
//! prefer it.
//!
//! The two differ in the names in comments and in how numbers are written; values are equal.

use std::{borrow::Cow, fmt::Write as _};

/// A text format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The text format of Prometheus, 0.0.4.
    Plain,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The format that an `Accept` header prefers; the plain one if it has no preference.
    pub fn accepted(accept: &str) -> Self {
        let weight = |kinds: &[&str]| {
            let offers = accept.split(',').map(|offer| offer.split(';').map(str::trim));
            let weights = offers.filter_map(|mut offer| {
                let kind = offer.next()?;
                let quality = offer.find_map(|part| part.strip_prefix("q=")?.parse().ok());
                kinds.contains(&kind).then_some(quality.unwrap_or(1.0))
            });
            weights.fold(0.0_f64, f64::max)
        };
        let plain = weight(&["text/plain", "text/*", "*/*"]);
        if weight(&["application/openmetrics-text"]) > plain {
            Self::OpenMetrics
        } else {
            Self::Plain
        }
    }

    /// The value of the header `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Converts OpenMetrics to the text format of Prometheus, in which a counter has the name of
/// its samples and a help text has no full stop at its end.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take() {
                let help = help.strip_suffix('.').unwrap_or(help);
                let _ = writeln!(plain, "# HELP {name}{suffix} {help}");
            }
            let _ = writeln!(plain, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            let _ = writeln!(plain, "{}", as_go_writes(line));
        }
    }
    plain
}

/// Writes a histogram bucket as Go does: the bound is the last label, and has no fraction if
/// it is an integer. Other lines stay as they are.
fn as_go_writes(line: &str) -> Cow<'_, str> {
    let parts = || {
        let (name, rest) = line.split_once("{le=\"")?;
        let (bound, rest) = rest.split_once('"')?;
        let (labels, value) = rest.rsplit_once('}')?;
        let bound = bound.strip_suffix(".0").unwrap_or(bound);
        let labels = labels.strip_prefix(',').map(|labels| format!("{labels},"));
        Some(format!("{name}{{{}le=\"{bound}\"}}{value}", labels.unwrap_or_default()))
    };
    parts().map_or(Cow::Borrowed(line), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_is_for_clients_that_prefer_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,\
            text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,\
            */*;q=0.1";
        let rows = [
            ("", Format::Plain),
            ("*/*", Format::Plain),
            ("text/plain", Format::Plain),
            ("application/openmetrics-text", Format::OpenMetrics),
            (prometheus, Format::OpenMetrics),
            ("application/openmetrics-text;q=0.2, text/plain;q=0.3", Format::Plain),
            ("application/json", Format::Plain),
        ];
        for (accept, expected) in rows {
            assert_eq!(Format::accepted(accept), expected, "{accept}");
        }
    }

    #[test]
    fn plain_text_names_counters_by_their_samples() {
        let open = "# HELP a Things done.\n# TYPE a counter\n# UNIT a seconds\na_total{b=\"c.0\"} 1\n\
            # HELP build Versions.\n# TYPE build info\nbuild_info{v=\"1.0\"} 1\n\
            # HELP d Times.\n# TYPE d histogram\nd_bucket{le=\"1.0\"} 2\n\
            d_bucket{le=\"0.25\",a=\"b\"} 1\nd_bucket{le=\"+Inf\"} 2\nd_sum 1.0\n# EOF\n";
        let expected = "# HELP a_total Things done\n# TYPE a_total counter\na_total{b=\"c.0\"} 1\n\
            # HELP build_info Versions\n# TYPE build_info gauge\nbuild_info{v=\"1.0\"} 1\n\
            # HELP d Times\n# TYPE d histogram\nd_bucket{le=\"1\"} 2\n\
            d_bucket{a=\"b\",le=\"0.25\"} 1\nd_bucket{le=\"+Inf\"} 2\nd_sum 1.0\n";
        assert_eq!(plain(open), expected);
    }
}
