// What Traefik's commercial edition adds to the configuration of routers. The
// module of this name is not published.
module github.com/traefik/traefik/dynamic/ext

go 1.26.0
