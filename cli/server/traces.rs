//! Spans of requests for a collector (OpenTelemetry), where `OTEL_EXPORTER_OTLP_ENDPOINT` names
//! one. The other variables of that standard count too.
//!
//! A program that was built without the feature `otel` notes that it sends none.

use std::env;

use anyhow::Result;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::registry::LookupSpan;

#[cfg(feature = "otel")]
use with_otel::Sender;
#[cfg(not(feature = "otel"))]
use without_otel::Sender;

/// What has not been sent yet is sent when this is dropped.
pub struct Traces(Sender);

impl Traces {
    /// `None`: nothing is sent.
    pub fn begin() -> Result<Option<Self>> {
        let names = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        let is_named = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        if !names.into_iter().any(is_named) {
            return Ok(None);
        }
        Ok(Sender::new()?.map(Self))
    }

    /// What listens to spans.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        self.0.layer()
    }
}

#[cfg(feature = "otel")]
mod with_otel {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_otlp::SpanExporter;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::filter::LevelFilter;

    use super::*;

    pub struct Sender(SdkTracerProvider);

    impl Sender {
        pub fn new() -> Result<Option<Self>> {
            let exporter = SpanExporter::builder().with_http().build()?;
            let service = Resource::builder().with_service_name("strand").build();
            let provider = SdkTracerProvider::builder()
                .with_resource(service)
                .with_batch_exporter(exporter)
                .build();
            Ok(Some(Self(provider)))
        }

        pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
            let tracer = self.0.tracer("strand");
            tracing_opentelemetry::layer().with_tracer(tracer).with_filter(LevelFilter::INFO)
        }
    }

    impl Drop for Sender {
        fn drop(&mut self) {
            if let Err(error) = self.0.shutdown() {
                tracing::warn!(%error, "the last spans could not be sent");
            }
        }
    }
}

#[cfg(not(feature = "otel"))]
mod without_otel {
    use tracing_subscriber::layer::Identity;

    use super::*;

    /// There is none.
    pub enum Sender {}

    impl Sender {
        pub fn new() -> Result<Option<Self>> {
            crate::note("this program was built without the feature otel, and sends no spans");
            Ok(None)
        }

        pub fn layer<S: Subscriber>(&self) -> impl Layer<S> + use<S> {
            Identity::new()
        }
    }
}
