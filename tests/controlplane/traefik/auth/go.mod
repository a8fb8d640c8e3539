// What Traefik uses of its fork of go-http-auth, which is not published
// everywhere.
module github.com/abbot/go-http-auth

go 1.26.0
