//! `GET /openapi.json`: the table of routes for programs that read it.

use axum::Json;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::path::{
    Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Content, HttpMethod, InfoBuilder, ObjectBuilder, OpenApi, OpenApiBuilder,
    PathsBuilder, Ref, Required, ResponseBuilder, Type,
};

use super::auth::Access;
use super::routes::{self, Route};
use super::wire::chat::{ChatChunk, ChatCompletion};
use super::wire::completions::TextCompletion;

const KEY: &str = "key";

pub async fn get() -> Json<OpenApi> {
    Json(document())
}

/// Made of the table alone: what is not in it is not served.
pub fn document() -> OpenApi {
    let mut paths = PathsBuilder::new();
    for route in routes::table() {
        let path = route.path.replace("{*", "{");
        paths = paths.path(path, PathItem::new(method(&route), operation(&route)));
    }
    let components = ComponentsBuilder::new()
        .schema_from::<ChatCompletion>()
        .schema_from::<ChatChunk>()
        .schema_from::<TextCompletion>()
        .security_scheme(KEY, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)))
        .build();
    let info = InfoBuilder::new().title("Strand").version(env!("CARGO_PKG_VERSION")).build();
    OpenApiBuilder::new().info(info).paths(paths).components(Some(components)).build()
}

fn method(route: &Route) -> HttpMethod {
    match route.method.as_str() {
        "GET" => HttpMethod::Get,
        "POST" => HttpMethod::Post,
        "PUT" => HttpMethod::Put,
        "PATCH" => HttpMethod::Patch,
        "DELETE" => HttpMethod::Delete,
        other => unreachable!("no route has the method {other}"),
    }
}

fn operation(route: &Route) -> Operation {
    let answer = ResponseBuilder::new().description("What was asked for");
    let answer = match answer_of(route.path) {
        Some(name) => answer.content("application/json", Content::new(Some(schema(name)))),
        None => answer,
    };
    let refusal = ResponseBuilder::new().description("Why not, as OpenAI's errors are").build();
    let mut operation = OperationBuilder::new()
        .parameters(Some(parameters(route.path)))
        .response("200", answer.build())
        .response("default", refusal);
    if route.method == "POST" {
        let object = Content::new(Some(ObjectBuilder::new().schema_type(Type::Object).build()));
        let body = RequestBodyBuilder::new().content("application/json", object);
        operation = operation.request_body(Some(body.build()));
    }
    if route.access != Access::Open {
        operation = operation.security(SecurityRequirement::new(KEY, [] as [&str; 0]));
    }
    operation.build()
}

fn schema(name: &str) -> Ref {
    Ref::from_schema_name(name)
}

fn answer_of(path: &str) -> Option<&'static str> {
    match path {
        "/v1/chat/completions" => Some("ChatCompletion"),
        "/v1/completions" => Some("TextCompletion"),
        _ => None,
    }
}

fn parameters(path: &str) -> Vec<Parameter> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let parameter = |name: &str| {
        ParameterBuilder::new()
            .name(name.trim_start_matches('*'))
            .parameter_in(ParameterIn::Path)
            .required(Required::True)
            .schema(Some(ObjectBuilder::new().schema_type(Type::String).build()))
            .build()
    };
    names.map(parameter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_in_the_document_and_nothing_else() {
        let document = serde_json::to_value(document()).expect("it is JSON");
        let paths = document["paths"].as_object().expect("it has paths");
        let listed: usize =
            paths.values().map(|item| item.as_object().expect("methods").len()).sum();
        assert_eq!(listed, routes::table().len());
        for route in routes::table() {
            let method = route.method.as_str().to_lowercase();
            let operation = &paths[&route.path.replace("{*", "{")][&method];
            assert!(operation.is_object(), "{method} {} is not there", route.path);
            let is_open = operation.get("security").is_none();
            assert_eq!(is_open, route.access == Access::Open, "{}", route.path);
        }
    }
}
